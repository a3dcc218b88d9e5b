/**
 * HY-WU in the frontend: after a run, the Generate, Inspect and Load LoRA nodes show the LoRA's norm map
 * and the time taken. The nodes send `hywu_norms` in their ui output: a list with a map for each image
 * and stack of layers {title, item, items, stack, layers: [name], modules: [name],
 * norms: [module][layer], max, seconds, cached}; nodes/ui.py says what they are.
 *
 * Only what both the frontend of ComfyUI 0.3.75 and the current ones offer is used (a DOM widget, which
 * the canvas and the Vue nodes both place), and each piece is asked for before it is used.
 */
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { currentLocale, translateDefinitions, translateNode } from "./locale.js";
import { notice } from "./notices.js";
import { element, frame, grow, nodesAt, panel, panelOf, removePanel } from "./panel.js";

const NODES = new Set(["HYWUGenerateLoRA", "HYWUInspectLoRA", "HYWULoadLoRA"]);
const KEY = "hywu_norms";
/** More numbers than this are shown but not kept in the workflow file. */
const KEPT_NUMBERS = 4096;
/** The template that stands first, by which the extension's list is known. */
const FIRST_TEMPLATE = "01 Edit an image";
/** Of the last so many prompts, a map is looked for. */
const REMEMBERED_PROMPTS = 32;
/** Black, violet, orange, yellow: the colours of the Inspect node's image. */
const COLOURS = [[0, 0, 5], [128, 18, 128], [250, 128, 51], [255, 255, 178]];

/**
 * Class -> [widget, what "control after generate" begins with]. The frontend begins with "randomize", by
 * which a training never goes on where it stopped and items come in no order; a saved workflow keeps its own.
 */
const AFTER_A_RUN = { HYWUTrainGenerator: ["seed", "fixed"], HYWUBenchmarkItems: ["index", "increment"] };

const TEXTS = {
  en: {
    layers: "layers", largest: "largest", took: (s) => `${s} s`, cached: "from the cache",
    previous: "previous map", next: "next map", norm: "norm of strength 1",
  },
  zh: {
    layers: "层", largest: "最大", took: (s) => `${s} 秒`, cached: "来自缓存",
    previous: "上一幅范数图", next: "下一幅范数图", norm: "强度为 1 时的范数",
  },
};

function texts() {
  return currentLocale().startsWith("zh") ? TEXTS.zh : TEXTS.en;
}

/** The well-formed maps of a ui output or of a saved workflow; anything else is passed over. */
function readMaps(value) {
  const isNames = (names) => Array.isArray(names) && names.length > 0;
  return (Array.isArray(value) ? value : []).filter((map) =>
    isNames(map?.layers) && isNames(map.modules) && Array.isArray(map.norms)
    && map.norms.length === map.modules.length
    && map.norms.every((row) => Array.isArray(row) && row.length === map.layers.length));
}

/** The maps with four digits, as many of them as a workflow file should carry. */
function keptMaps(maps) {
  let numbers = 0;
  return maps
    .filter((map) => (numbers += map.layers.length * map.modules.length) <= KEPT_NUMBERS)
    .map((map) => ({ ...map, norms: map.norms.map((row) => row.map((x) => Number(digits(x)))) }));
}

function digits(value) {
  return Number(value).toPrecision(4);
}

function colour(share) {
  const place = Math.min(Math.max(share, 0), 1) * (COLOURS.length - 1);
  const low = Math.min(Math.floor(place), COLOURS.length - 2);
  return COLOURS[low].map((c, i) => Math.round(c + (COLOURS[low + 1][i] - c) * (place - low)));
}

/** One pixel a cell; the page enlarges it without smoothing. */
function paint(canvas, map, largest) {
  canvas.width = map.layers.length;
  canvas.height = map.modules.length;
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(canvas.width, canvas.height);
  map.norms.flat().forEach((value, i) => {
    pixels.data.set([...colour(largest > 0 ? value / largest : 0), 255], 4 * i);
  });
  context.putImageData(pixels, 0, 0);
}

function name(map) {
  return [map.title, map.stack].filter(Boolean).join(" · ");
}

/** Rows are lower where there are many; labels disappear where they could not be read. */
function rowHeight(map) {
  return map.modules.length <= 16 ? 14 : Math.max(2, Math.floor(224 / map.modules.length));
}

/** The norm map of a node: a canvas with its labels, in the theme's own colours. */
class NormMap {
  constructor() {
    this.maps = [];
    this.index = 0;
    this.root = frame("hywu-norm-map");
    this.root.setAttribute("role", "img");
  }

  /** Of the largest map, so that turning the pages moves nothing. */
  get height() {
    const rows = this.maps.map((map) => rowHeight(map) * map.modules.length);
    return 66 + Math.max(0, ...rows);
  }

  show(maps) {
    this.maps = maps;
    this.index = Math.min(this.index, maps.length - 1);
    this.draw();
  }

  draw() {
    const map = this.maps[this.index];
    const words = texts();
    // The image's largest, so that its stacks share one scale
    const largest = Number.isFinite(map.max) ? map.max : Math.max(...map.norms.flat(), 0);
    this.root.replaceChildren(this.heading(map, words), this.body(map, largest),
      this.legend(map, largest, words));
    this.root.setAttribute("aria-label", `${name(map)}: ${words.largest} ${digits(largest)}`);
  }

  heading(map, words) {
    const line = element("div", { display: "flex", gap: "6px", height: "18px", whiteSpace: "nowrap" });
    const title = element("b", { flex: "1", overflow: "hidden", textOverflow: "ellipsis" }, name(map));
    title.title = name(map);
    line.append(title);
    if (this.maps.length > 1) {
      line.append(this.turn("‹", -1, words.previous),
        element("span", {}, `${this.index + 1}/${this.maps.length}`), this.turn("›", 1, words.next));
    }
    const seconds = Number.isFinite(map.seconds) ? words.took(map.seconds.toFixed(2)) : "";
    const time = element("span", {}, [map.cached ? words.cached : "", seconds].filter(Boolean).join(", "));
    time.className = "hywu-time";
    line.append(time);
    return line;
  }

  turn(sign, step, label) {
    const button = element("button", {
      all: "unset", cursor: "pointer", padding: "0 5px", color: "inherit",
    }, sign);
    button.setAttribute("aria-label", label);
    button.title = label;
    button.addEventListener("click", () => {
      this.index = (this.index + step + this.maps.length) % this.maps.length;
      this.draw();
    });
    return button;
  }

  body(map, largest) {
    const height = rowHeight(map);
    const body = element("div", { display: "flex", gap: "6px" });
    if (height >= 10) {
      const labels = element("div", { maxWidth: "45%", textAlign: "right" });
      for (const module of map.modules) {
        labels.append(element("div", {
          height: `${height}px`, lineHeight: `${height}px`, fontSize: "10px", whiteSpace: "nowrap",
          overflow: "hidden", textOverflow: "ellipsis", direction: "rtl",
        }, `\u2066${module}\u2069`)); // right to left cuts the beginning of a long path, not its end
      }
      body.append(labels);
    }
    const canvas = element("canvas", {
      flex: "1", minWidth: "0", height: `${height * map.modules.length}px`,
      imageRendering: "pixelated", outline: "1px solid var(--border-color, #666)",
    });
    paint(canvas, map, largest);
    canvas.addEventListener("mousemove", (event) => {
      const box = canvas.getBoundingClientRect();
      const at = (share, count) => Math.min(count - 1, Math.max(0, Math.floor(share * count)));
      const layer = at((event.clientX - box.left) / box.width, map.layers.length);
      const module = at((event.clientY - box.top) / box.height, map.modules.length);
      canvas.title = `${map.layers[layer]} ${map.modules[module]}: ${digits(map.norms[module][layer])}`;
    });
    body.append(canvas);
    return body;
  }

  legend(map, largest, words) {
    const line = element("div", {
      display: "flex", gap: "6px", alignItems: "center", marginTop: "6px", whiteSpace: "nowrap",
    });
    const stops = COLOURS.map((c) => `rgb(${c.join()})`).join();
    line.append(element("span", {}, "0"),
      element("span", {
        flex: "1", height: "8px", background: `linear-gradient(90deg,${stops})`,
        outline: "1px solid var(--border-color, #666)",
      }),
      element("span", {}, digits(largest)),
      element("span", { opacity: "0.8" }, `${map.layers.length} ${words.layers} →`));
    line.title = words.norm;
    return line;
  }
}

/** Show maps on a node; its panel is made with the first ones and goes when there are none. */
function showMaps(node, maps) {
  if (!maps.length) {
    removePanel(node, KEY);
    return;
  }
  const view = panel(node, KEY, () => new NormMap());
  if (!view) return;
  view.show(maps);
  grow(node, 270);
  if (node.comfyClass !== "HYWUInspectLoRA") return;
  // The map again as an image is for programs and further nodes.
  node.hideOutputImages = true;
  node.onDrawBackground = () => {}; // older frontends, and the canvas, draw it here
}

/** Classes and inputs of a node and of all before it in a prompt, to be compared. */
function recipe(prompt, id) {
  const found = {};
  const ids = [String(id)];
  for (const at of ids) { // grows meanwhile
    const node = prompt?.[at];
    if (!node || found[at]) continue;
    found[at] = [node.class_type, node.inputs];
    const links = Object.values(node.inputs ?? {}).filter((v) => Array.isArray(v) && v.length === 2);
    ids.push(...links.map(([source]) => String(source)));
  }
  return JSON.stringify(found);
}

/**
 * A page that was opened anew hears nothing of nodes whose results ComfyUI still has (0.3.75; later ones
 * send them). What they show is from the last prompt that had the same nodes with the same inputs.
 */
async function recall(ids) {
  const bare = ids.filter((id) => {
    const node = nodesAt(id).at(-1);
    return NODES.has(node?.comfyClass) && !panelOf(node, KEY);
  });
  if (!bare.length) return;
  const answer = await api.fetchApi(`/history?max_items=${REMEMBERED_PROMPTS}`);
  const records = Object.values(await answer.json()).reverse(); // the newest first
  const { output: prompt } = await app.graphToPrompt();
  for (const id of ids) {
    if (!prompt?.[id]?.class_type?.startsWith("HYWU")) continue;
    const wanted = recipe(prompt, id);
    const record = records.find((r) => r.outputs?.[id] && recipe(r.prompt?.[2], id) === wanted);
    if (!record) continue;
    if (bare.includes(id)) nodesAt(id).at(-1).onExecuted(record.outputs[id]);
    notice(id, record.outputs[id]);
  }
}

/** What a new node's seed or index does after a run. */
function setAfterARun(node) {
  const [name, value] = AFTER_A_RUN[node.comfyClass] ?? [];
  const widget = node.widgets?.find((w) => w.name === name);
  const control = widget?.linkedWidgets?.find((w) => w.options?.values?.includes?.(value));
  if (control) control.value = value;
}

/** Call `added` after the method that is there already, whoever put it there. */
function chain(prototype, name, added) {
  const earlier = prototype[name];
  prototype[name] = function (...args) {
    const result = earlier?.apply(this, args);
    added.apply(this, args);
    return result;
  };
}

/**
 * ComfyUI lists templates as the file system does; these have numbers in their names. The call is wrapped
 * because the server globs the folder itself and no frontend has a hook, or an index file, for a pack's order.
 */
function sortTemplates() {
  const list = api.getWorkflowTemplates;
  if (typeof list !== "function") return;
  api.getWorkflowTemplates = async function (...args) {
    const templates = await list.apply(this, args);
    for (const names of Object.values(templates ?? {})) {
      if (Array.isArray(names) && names.includes(FIRST_TEMPLATE)) names.sort();
    }
    return templates;
  };
}

app.registerExtension({
  name: "hywu",

  setup() {
    sortTemplates();
    api.addEventListener("executed", ({ detail }) => notice(detail?.node, detail?.output));
    // what a node is writing (HunyuanImage-3 Think), or had written when it was stopped
    api.addEventListener("hywu_text", ({ detail }) => notice(detail?.node, detail?.output));
    api.addEventListener("execution_cached", ({ detail }) => {
      recall(detail?.nodes ?? []).catch((error) => console.warn("HY-WU: no norm maps:", error));
    });
  },

  addCustomNodeDefs: (definitions) => translateDefinitions(definitions),

  nodeCreated(node) {
    translateNode(node);
    setAfterARun(node);
  },

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!NODES.has(nodeData?.name)) return;
    chain(nodeType.prototype, "onExecuted", function (output) {
      if (!Array.isArray(output?.[KEY])) return;
      const maps = readMaps(output[KEY]);
      this.properties ??= {};
      this.properties[KEY] = keptMaps(maps);
      showMaps(this, maps);
    });
    // A workflow loaded again shows what its last run gave.
    chain(nodeType.prototype, "onConfigure", function () {
      showMaps(this, readMaps(this.properties?.[KEY]));
    });
  },
});
