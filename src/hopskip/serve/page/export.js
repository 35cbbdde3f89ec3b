// A chat as a file.

import { el } from "./state.js";

export function asMarkdown(chat) {
  const parts = chat.turns.map((turn) => turn.role === "user" ? `**You:**\n\n${turn.text}` : `**Model:**\n\n${turn.text || turn.error || ""}`);
  return `# ${chat.title}\n\n${parts.join("\n\n")}\n`;
}

// Messages as the API takes them, and with each answer what the page knows of it.
export function asJSON(chat, card) {
  const messages = chat.turns.map(({ role, text, stats, race, tokens, finish, error }) => role === "user" ? { role, content: text }
    : { role, content: text, finish_reason: finish, error, stats, race, tokens: tokens && tokens.map((t) => ({ text: t.t, origin: t.o, layer: t.l })) });
  return `${JSON.stringify({ title: chat.title, model: card && card.id, messages }, null, 1)}\n`;
}

export function saveFile(chat, suffix, type, text) {
  const link = el("a"), url = URL.createObjectURL(new Blob([text], { type }));
  link.href = url;
  link.download = `${chat.title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60) || "chat"}.${suffix}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
