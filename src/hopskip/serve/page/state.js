// What all parts of the page share: its state, and small things to draw with.

export const $ = (id) => document.getElementById(id);
export const ORIGINS = {
  "early-exit": "early-exit draft", "layer-skip": "layer-skip draft", "exit-branch": "trained-exit draft", "ngram": "n-gram draft",
  "bonus": "bonus after a whole draft", "target": "the whole model",
};
const STORE = "hopskip.v1";

// What a reload keeps.
export const state = { turns: [], settings: { enabled: true, k: null, exit: null, race: false, colours: true, temperature: 0, max: 256, system: "" }, theme: null };
try {
  const kept = JSON.parse(localStorage.getItem(STORE) || "{}");
  Object.assign(state.settings, kept.settings);
  if (Array.isArray(kept.turns)) state.turns = kept.turns;
  state.theme = kept.theme || null;
} catch { /* nothing to go on with */ }

// What a reload forgets: the server's model, the answer on its way, and its rates so far.
export const live = { card: null, running: null, rates: [] };

export function save() {
  // alternatives of old tokens are the first to go when there is no room
  for (const keep of [Infinity, 6, 2, 0]) {
    const turns = state.turns.map((t, i) => state.turns.length - i > keep ? { ...t, tokens: t.tokens && t.tokens.map((k) => ({ ...k, top: [] })) } : t);
    try { localStorage.setItem(STORE, JSON.stringify({ turns, settings: state.settings, theme: state.theme })); return; } catch { /* full: try with less */ }
  }
}

export function applyTheme() {
  document.documentElement.dataset.theme = state.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", applyTheme);
applyTheme();

export const el = (tag, className, text) => {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
};
export const percent = (x) => x >= 0.9995 || x < 0.0005 ? `${Math.round(x * 100)} %` : `${(x * 100).toFixed(x < 0.1 ? 1 : 0)} %`;
export const visible = (text) => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ | $/g, "␣");

// What the server's draft allows.
export const canComeFrom = (origin) => {
  const { draft, exit_layer } = live.card ? live.card.hopskip : { draft: "none", exit_layer: null };
  if (origin === "target") return true;
  if (origin === "bonus") return draft !== "none";
  if (draft === "auto") return origin === "ngram";  // an exit's tokens join the list when they come
  return draft === origin || draft === "both" && (origin === "ngram" || origin === (exit_layer === null ? "exit-branch" : "early-exit"));
};
export const canChooseExit = () => live.card && ["early-exit", "both"].includes(live.card.hopskip.draft) && live.card.hopskip.exit_layer !== null && live.card.hopskip.verify !== "reuse";
