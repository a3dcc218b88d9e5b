/**
 * What a node has to say after a run, drawn on it: its warnings (`hywu_warnings` of the ui output, a list of
 * sentences) and its report (`text`). Warnings from inside a subgraph stand on the subgraph's node, too, and
 * in App mode, which shows no nodes, they are the frontend's own messages.
 */
import { app } from "../../../scripts/app.js";
import { element, frame, grow, nodesAt, panel, panelOf, removePanel } from "./panel.js";

const KEY = "hywu_notice";
const OURS = "HYWU";
/** These draw a map instead of their report. */
const WITH_MAP = new Set(["HYWUGenerateLoRA", "HYWUInspectLoRA", "HYWULoadLoRA"]);
/** Lines of a report that are drawn; the rest is in its tooltip. */
const LINES = 3;
const LINE = 14;
/** Values of the frontend's `activeMode` in which the graph isn't seen. */
const APP_MODES = new Set(["app", "builder:arrange"]);
/** Milliseconds that a message stays. */
const STAYS = 12_000;

/** A report as a person reads it: of a JSON object what is short, of a text its first lines. */
export function readable(text) {
  let value;
  try {
    value = JSON.parse(text);
  } catch {
    value = null;
  }
  if (value && typeof value === "object" && !Array.isArray(value)) {
    return Object.entries(value)
      .filter(([, v]) => ["number", "boolean"].includes(typeof v)
        || (typeof v === "string" && v.length > 0 && v.length < 40))
      .map(([key, v]) => `${key.replaceAll("_", " ")}: ${typeof v === "number" ? Number(v.toPrecision(4)) : v}`)
      .join(" · ");
  }
  return String(text).trim();
}

/** Lines that a text takes, in letters of the widest font that browsers fall back to. */
function lineCount(text, width) {
  const letters = Math.max(20, Math.floor((width - 44) / 6.7));
  return text.split("\n").reduce((sum, line) => sum + Math.max(1, Math.ceil(line.length / letters)), 0);
}

class Notice {
  constructor(node) {
    this.node = node;
    this.root = frame("hywu-notice");
    /** Id of the node that warned -> its sentences. */
    this.warnings = new Map();
    this.report = "";
  }

  get sentences() {
    return [...new Set([...this.warnings.values()].flat())];
  }

  get empty() {
    return !this.report && !this.sentences.length;
  }

  get height() {
    const width = this.node.size?.[0] ?? 300;
    const warned = this.sentences.reduce((sum, text) => sum + lineCount(`⚠ ${text}`, width), 0);
    const told = this.report ? Math.min(LINES, lineCount(this.report, width)) : 0;
    // the canvas keeps a margin of 10 pixels above and below
    return 36 + LINE * (warned + told) + (warned && told ? 4 : 0);
  }

  draw() {
    const rows = this.sentences.map((text) => {
      const row = element("div", { color: "var(--hywu-warning, #ffb454)" }, `⚠ ${text}`);
      row.className = "hywu-warning";
      row.setAttribute("role", "alert");
      return row;
    });
    if (this.report) {
      const row = element("div", {
        marginTop: rows.length ? "4px" : "0", maxHeight: `${LINES * LINE}px`, overflow: "hidden",
        whiteSpace: "pre-wrap", overflowWrap: "anywhere", opacity: "0.85",
      }, this.report);
      row.className = "hywu-report";
      row.title = this.report;
      rows.push(row);
    }
    this.root.replaceChildren(...rows);
  }
}

/** Change a node's notice; it goes when nothing is left to say. */
function change(node, what) {
  const view = panelOf(node, KEY) ?? new Notice(node);
  what(view);
  if (view.empty) {
    removePanel(node, KEY);
    return;
  }
  view.draw();
  if (panel(node, KEY, () => view)) grow(node);
}

/** Warnings as messages over the page, where no node can show them. */
function tellApp(sentences) {
  const manager = app.extensionManager;
  const workflow = manager?.workflow?.activeWorkflow;
  if (!APP_MODES.has(workflow?.activeMode ?? workflow?.initialMode)) return;
  for (const detail of new Set(sentences)) {
    manager.toast?.add?.({ severity: "warn", summary: "HY-WU", detail, life: STAYS });
  }
}

/** Draw what the node with this id of the prompt has sent; inner ones warn on the outer ones as well. */
export function notice(id, output) {
  const nodes = nodesAt(id);
  const node = nodes.at(-1);
  if (!node?.comfyClass?.startsWith(OURS) || !output) return;
  const texts = (list) => (Array.isArray(list) ? list.filter((text) => typeof text === "string") : []);
  const warnings = texts(output.hywu_warnings);
  tellApp(warnings);
  const report = WITH_MAP.has(node.comfyClass) ? "" : texts(output.text).map(readable).join("\n");
  for (const one of nodes) {
    change(one, (view) => {
      view.warnings.set(String(id), warnings);
      if (one === node) view.report = report;
    });
  }
}
