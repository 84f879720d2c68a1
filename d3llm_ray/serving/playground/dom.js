// Small helpers. What a model or a user wrote becomes a text node, never markup.

export const $ = (id) => document.getElementById(id);

/** An element with properties (`class`, `role`, `aria-...`, or a listener as `onclick`) and children. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (typeof value === "boolean") made.toggleAttribute(name, value);
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** Set an element's text only where it differs, so that nothing is drawn or announced for nothing. */
export function say(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

export function fill(select, options, chosen) {
  select.replaceChildren(...options.map((name) => element("option", { value: name }, name)));
  select.value = options.includes(chosen) ? chosen : options[0] ?? "";
}

export function remember(name, value) {
  try {
    localStorage.setItem(name, value);
  } catch {
    // Storage may be off; the choice then lasts as long as the page.
  }
}

export function recall(name) {
  try {
    return localStorage.getItem(name);
  } catch {
    return null;
  }
}
