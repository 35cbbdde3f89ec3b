// What all parts of the page share: the open chat, settings, and small things to draw with.

export const $ = (id) => document.getElementById(id);
export const ORIGINS = {
  "early-exit": "early-exit draft", "layer-skip": "layer-skip draft", "exit-branch": "trained-exit draft", "ngram": "n-gram draft",
  "bonus": "bonus after a whole draft", "target": "the whole model",
};

// What a reload keeps, beside the chats. `k` and `exit` are the server's as long as they are null.
const SETTINGS = "hopskip.settings";
const DEFAULTS = { enabled: true, k: null, exit: null, race: false, alternatives: false, own: true, temperature: 0, max: 512, system: "", view: "text", theme: null };
export const settings = { ...DEFAULTS, ...readSettings() };

// What a reload forgets: the server's model, the key it wants, the open chat, the answer on its way and its rates so far.
export const live = { card: null, key: null, chat: null, running: null, rates: [] };

function readSettings() {
  try {
    const kept = JSON.parse(localStorage.getItem(SETTINGS)) || {};
    return Object.fromEntries(Object.entries(kept).filter(([name, value]) => name in DEFAULTS && (DEFAULTS[name] === null || typeof value === typeof DEFAULTS[name])));
  } catch { return {}; /* none, or not readable */ }
}

export function saveSettings() {
  try { localStorage.setItem(SETTINGS, JSON.stringify(settings)); } catch { /* full or forbidden: they hold for this visit */ }
}

export function applyTheme() {
  document.documentElement.dataset.theme = settings.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", applyTheme);
applyTheme();

// A new element, from text: the policy of the page lets no text become markup.
export const el = (tag, className, text) => {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
};

const SVG = "http://www.w3.org/2000/svg";
export function iconButton(className, path, label, run, text = "") {
  const button = el("button", className), svg = document.createElementNS(SVG, "svg"), line = document.createElementNS(SVG, "path");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  line.setAttribute("d", path);
  svg.append(line);
  button.type = "button";
  button.append(svg);
  if (text) button.append(el("span", "", text));
  if (label !== text) { button.setAttribute("aria-label", label); button.title = label; }
  button.onclick = run;
  return button;
}

export const percent = (x) => x >= 0.9995 || x < 0.0005 ? `${Math.round(x * 100)} %` : `${(x * 100).toFixed(x < 0.1 ? 1 : 0)} %`;
export const visible = (text) => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ | $/g, "␣");
export const announce = (text) => { $("announce").textContent = text; };

export function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

// Put a text on the clipboard, and say on the button whether that has worked.
export async function copyText(text, button) {
  let isDone = true;
  try { await navigator.clipboard.writeText(text); }
  catch { isDone = copyByCommand(text); /* only pages of https and of this machine have a clipboard */ }
  const label = button.querySelector("span") || button, before = label.dataset.label || label.textContent;
  label.dataset.label = before;
  label.textContent = isDone ? "Copied" : "Not copied";
  announce(label.textContent);
  setTimeout(() => { label.textContent = before; }, 1500);
}

function copyByCommand(text) {
  const area = el("textarea", "unseen"), focused = document.activeElement;
  area.value = text;
  document.body.append(area);
  area.select();
  const isDone = document.execCommand("copy");
  area.remove();
  if (focused) focused.focus();
  return isDone;
}
