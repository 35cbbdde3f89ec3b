// The list of chats: open, rename, delete, and save as a file.

import { deleteChat, listChats, openChat, renameChat, saveChat } from "./chats.js";
import { hooks, show, startNew, stop } from "./conversation.js";
import { asJSON, asMarkdown, saveFile } from "./export.js";
import { $, el, iconButton, live } from "./state.js";

const RENAME = "M4 20h4L19 9l-4-4L4 16zM13 7l4 4", DELETE = "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13";

export function drawChats() {
  const focused = document.activeElement && document.activeElement.dataset.key;
  $("chat-list").replaceChildren(...listChats().map(chatItem));
  if (focused) (document.querySelector(`[data-key="${CSS.escape(focused)}"]`) || $("new")).focus();
  $("export").hidden = !live.chat.turns.length;
  document.title = live.chat.title ? `${live.chat.title} – hopskip` : "hopskip";
}

function chatItem(chat) {
  const item = el("li"), open = el("button", "open", chat.title);
  open.dir = "auto";
  open.title = chat.title;
  open.dataset.key = `open ${chat.id}`;
  if (chat.id === live.chat.id) open.setAttribute("aria-current", "true");
  open.onclick = () => { if (chat.id !== live.chat.id) show(openChat(chat.id)); closeChats(); };
  const rename = iconButton("quiet", RENAME, `Rename “${chat.title}”`, () => editTitle(item, chat));
  const remove = iconButton("quiet", DELETE, `Delete “${chat.title}”`, () => removeChat(chat));
  rename.dataset.key = `rename ${chat.id}`;
  item.append(open, rename, remove);
  return item;
}

function editTitle(item, chat) {
  const input = el("input");
  let isDone = false;
  const done = (isKept) => {
    if (isDone) return;  // its removal takes the focus away, too
    isDone = true;
    if (isKept) renameChat(chat.id, input.value);
    input.dataset.key = `rename ${chat.id}`;
    drawChats();
  };
  input.value = chat.title;
  input.dir = "auto";
  input.setAttribute("aria-label", "Title of the chat");
  input.onkeydown = (event) => {
    if (event.isComposing || event.keyCode === 229) return;
    if (event.key === "Enter" || event.key === "Escape") { event.preventDefault(); event.stopPropagation(); done(event.key === "Enter"); }
  };
  input.onblur = () => done(true);
  item.replaceChildren(input);
  input.select();
  input.focus();
}

function removeChat(chat) {
  if (!confirm(`Delete the chat “${chat.title}”?`)) return;
  if (chat.id === live.chat.id) {
    stop();
    live.chat.turns = [];  // an answer that is being stopped is not kept, either
    deleteChat(chat.id);
    startNew();
  } else {
    deleteChat(chat.id);
    drawChats();
  }
  $("new").focus();
}

// True if the list lay open over the page.
export function closeChats() {
  if (!$("chats").classList.contains("open")) return false;
  $("chats").classList.remove("open");
  $("chats-toggle").setAttribute("aria-expanded", "false");
  $("chats-toggle").focus();
  return true;
}

hooks.onChange = drawChats;
$("new").onclick = () => { startNew(); closeChats(); $("input").focus(); };
$("chats-toggle").onclick = () => $("chats-toggle").setAttribute("aria-expanded", String($("chats").classList.toggle("open")));
$("export-markdown").onclick = () => saveFile(live.chat, "md", "text/markdown", asMarkdown(live.chat));
$("export-json").onclick = () => saveFile(live.chat, "json", "application/json", asJSON(live.chat, live.card));
addEventListener("storage", drawChats);  // another window has changed them
addEventListener("pagehide", () => { if (live.running) saveChat(live.chat); });
