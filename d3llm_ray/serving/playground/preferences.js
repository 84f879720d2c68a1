// The theme, which this browser remembers, and the API key, which this tab does.

import { key } from "./api.js";
import { $, recall, remember } from "./dom.js";

const THEME = "d3llm-ray theme";

export function offerThemes() {
  const apply = (theme) => (document.documentElement.dataset.theme = theme);
  const select = $("theme");
  const known = [...select.options].map(({ value }) => value);
  select.value = known.includes(recall(THEME)) ? recall(THEME) : "system";
  apply(select.value);
  select.addEventListener("change", () => {
    apply(select.value);
    remember(THEME, select.value);
  });
}

/** `onChange()` is called when there is another key, or none. */
export function offerKey(onChange) {
  const dialog = $("key-dialog");
  const use = (value) => {
    key.set(value);
    $("key").value = "";
    onChange();
  };
  $("key-open").addEventListener("click", askForKey);
  $("key-form").addEventListener("submit", () => use($("key").value.trim()));
  $("key-forget").addEventListener("click", () => {
    dialog.close();
    use("");
  });
}

export function askForKey() {
  if (!$("key-dialog").open) $("key-dialog").showModal();
  $("key").focus();
}
