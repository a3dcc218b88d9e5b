/**
 * A panel of a node's own: an element of the page that the canvas and the Vue nodes both place, as a widget
 * that is neither sent with a prompt nor saved.
 */
import { app } from "../../../scripts/app.js";

export function element(tag, style, text = "") {
  const made = document.createElement(tag);
  Object.assign(made.style, style);
  made.textContent = text;
  return made;
}

/** The frame of a panel, in the theme's own colours. */
export function frame(name, style = {}) {
  const made = element("div", {
    boxSizing: "border-box", width: "100%", padding: "6px 8px", overflow: "hidden",
    flex: "0 0 auto", // Nodes 2.0 would stretch it over the node's spare height
    borderRadius: "6px", border: "1px solid var(--border-color, #666)",
    background: "var(--comfy-input-bg, #222)", color: "var(--input-text, #ddd)",
    font: "11px/14px system-ui, sans-serif", ...style,
  });
  made.className = name;
  return made;
}

export function panelOf(node, key) {
  return node?.widgets?.find((widget) => widget.name === key)?.hywuView;
}

/**
 * The node's panel of this key, made where it has none; null where the frontend offers no such thing.
 * make() gives a view: {root, height, …}; sizes are read again whenever the view has changed.
 */
export function panel(node, key, make) {
  const known = panelOf(node, key);
  if (known || typeof node?.addDOMWidget !== "function") return known ?? null;
  const view = make();
  const widget = node.addDOMWidget(key, key, view.root, {
    serialize: false, // not sent with the prompt
    hideOnZoom: true,
    getMinHeight: () => view.height,
    getMaxHeight: () => view.height,
  });
  widget.serialize = false; // and no widget value in the workflow
  widget.hywuView = view;
  return view;
}

export function removePanel(node, key) {
  const widget = node?.widgets?.find((w) => w.name === key);
  if (!widget) return;
  widget.onRemove?.();
  node.widgets.splice(node.widgets.indexOf(widget), 1);
}

/** Make the node at least as large as what it holds. */
export function grow(node, least = 0) {
  const [width, height] = node.computeSize?.() ?? [0, 0];
  const size = [Math.max(node.size[0], width, least), Math.max(node.size[1], height)];
  if (size[0] !== node.size[0] || size[1] !== node.size[1]) node.setSize?.(size);
  app.graph?.setDirtyCanvas?.(true, true);
}

/** The nodes on the way to an id of a prompt: "20:101" is node 101 in the subgraph of node 20. */
export function nodesAt(id) {
  const found = [];
  let graph = app.rootGraph ?? app.graph;
  for (const part of String(id).split(":")) {
    const node = graph?.getNodeById?.(Number(part)) ?? graph?.getNodeById?.(part);
    if (!node) return [];
    found.push(node);
    graph = node.subgraph;
  }
  return found;
}
