// Shows text that a model wrote: as text nodes only, with what can't be seen made visible.

// Control characters except tab and newline, direction marks and overrides, zero-width and other invisible characters.
// The joiners U+200C and U+200D stay: Persian, Hindi and many emoji need them.
const INVISIBLE =
  /[\u0000-\u0008\u000B-\u001F\u007F-\u009F\u00AD\u061C\u200B\u200E\u200F\u2028-\u202E\u2060-\u206F\uFEFF]|[\u{E0000}-\u{E007F}]/gu;

export function showText(element, text) {
  const parts = [];
  let end = 0;
  for (const match of text.matchAll(INVISIBLE)) {
    parts.push(text.slice(end, match.index), mark(match[0]));
    end = match.index + match[0].length;
  }
  parts.push(text.slice(end));
  element.replaceChildren(...parts.filter((part) => part !== ""));
  element.scrollTop = 0;
}

function mark(character) {
  const name = "U+" + character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
  const span = document.createElement("span");
  span.className = "control";
  span.dir = "ltr";
  span.textContent = name;
  return span;
}
