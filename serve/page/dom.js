// Creates elements. Text becomes text nodes; nothing here parses HTML.

export const byId = (id) => document.getElementById(id);

const make = (node, attributes, children) => {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child != null && child !== false));
  return node;
};

export const el = (tag, attributes, ...children) => make(document.createElement(tag), attributes, children);

export const svg = (tag, attributes, ...children) =>
  make(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

export const button = (label, onclick, attributes = {}) => el("button", { type: "button", onclick, ...attributes }, label);

const PATHS = {
  up: "M5 7v6.5H2.5V7H5Zm0 0 2.6-4.9c.9 0 1.5.7 1.4 1.6L8.6 6h3.7c.8 0 1.4.8 1.2 1.6l-1.2 4.8c-.2.7-.7 1.1-1.4 1.1H5",
  down: "M11 9V2.5h2.5V9H11Zm0 0-2.6 4.9c-.9 0-1.5-.7-1.4-1.6L7.4 10H3.7c-.8 0-1.4-.8-1.2-1.6l1.2-4.8c.2-.7.7-1.1 1.4-1.1H11",
  edit: "M3 13l.6-2.8L10.8 3l2.2 2.2-7.2 7.2L3 13Z",
};

export const icon = (name) =>
  svg("svg", { viewBox: "0 0 16 16", class: "icon", "aria-hidden": "true" }, svg("path", { d: PATHS[name] }));

// Tells screen readers about beginnings, ends and failures, not about each word of a stream.
export const announce = (text) => { byId("announcer").textContent = text; };

export const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

export const seconds = (value) => {
  if (value < 9.95) return `${value.toFixed(1)} s`;
  const whole = Math.round(value);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${String(whole % 60).padStart(2, "0")} s`;
  return `${Math.floor(whole / 3600)} h ${String(Math.floor((whole % 3600) / 60)).padStart(2, "0")} min`;
};

// Replaces the text only if it differs, so that focus and screen readers keep their place.
export const setText = (node, text) => { if (node.textContent !== text) node.textContent = text; };
