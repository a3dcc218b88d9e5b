/**
 * The frontend of ComfyUI 0.3.75 loads a language's texts late, over those of custom nodes, so that these
 * stay English. Here the same locales are applied once more, by hand; a frontend that has applied them
 * already (all current ones) is left alone.
 */
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

const PREFIX = "HYWU";
/** Class -> {locale, english, display_name, description, inputs, outputs}, of nodes that stayed English. */
const missing = {};
/** Class -> toggle -> language -> its two texts: the locale files have no place for them. */
const TOGGLES = {
  HYWUApplyLoRA: { apply_to_negative: { zh: ["仅正面", "两者"] } },
};

export function currentLocale() {
  const setting = app.extensionManager?.setting;
  return String(
    setting?.get?.("Comfy.Locale") ?? app.ui?.settings?.getSettingValue?.("Comfy.Locale") ?? "en");
}

/** The text that one of vue-i18n's messages shows. */
function plain(message) {
  return message.replace(/\{'([{}@|])'\}/g, "$1");
}

/** Put the current language's names and tooltips into node definitions that are still English. */
export async function translateDefinitions(definitions) {
  const locale = currentLocale();
  const ours = Object.keys(definitions).filter((name) => name.startsWith(PREFIX));
  if (locale === "en" || !ours.length) return;
  const texts = (await (await api.fetchApi("/i18n")).json())?.[locale]?.nodeDefs ?? {};
  for (const name of ours) {
    const definition = definitions[name];
    const text = texts[name];
    if (!text || definition.display_name === plain(text.display_name)) continue;
    missing[name] = { ...text, locale, english: definition.display_name };
    definition.display_name = plain(text.display_name);
    definition.description = plain(text.description);
    for (const inputs of Object.values(definition.input ?? {})) {
      for (const [key, options] of Object.entries(inputs)) {
        const tooltip = text.inputs?.[key]?.tooltip;
        if (tooltip && options[1]) options[1].tooltip = plain(tooltip);
      }
    }
    definition.output_tooltips = definition.output_tooltips?.map(
      (tooltip, i) => plain(text.outputs?.[i]?.tooltip ?? tooltip));
  }
}

/** Name the sockets and widgets of a new node, if its definition had to be translated here. */
export function translateNode(node) {
  labelToggles(node);
  const text = missing[node.comfyClass];
  if (text?.locale !== currentLocale()) return; // the language was changed since
  if (node.title === text.english) node.title = plain(text.display_name); // after R, definitions anew
  for (const input of node.inputs ?? []) {
    const name = text.inputs?.[input.name]?.name;
    if (name) input.localized_name = plain(name);
  }
  for (const widget of node.widgets ?? []) {
    const name = text.inputs?.[widget.name]?.name;
    if (name) widget.label = plain(name);
  }
  node.outputs?.forEach((output, i) => {
    const name = text.outputs?.[i]?.name;
    if (name) output.localized_name = plain(name);
  });
}

function labelToggles(node) {
  for (const [name, texts] of Object.entries(TOGGLES[node.comfyClass] ?? {})) {
    const options = node.widgets?.find((widget) => widget.name === name)?.options;
    const [off, on] = texts[currentLocale().split("-")[0]] ?? [];
    if (options && on) Object.assign(options, { on, off });
  }
}
