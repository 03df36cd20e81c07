// The few helpers for elements: text always goes in as text, never as markup.
const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, text] of Object.entries(value)) element.style.setProperty(key, text);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

// A section with a title, a word of what it shows, its drawing, and the same as a table at the press of a button.
export function section(id, title, words, drawing, table) {
  const data = h("div", { class: "scroll", hidden: true });
  const button = h("button", { "aria-pressed": "false", onclick: () => {
    if (!data.firstChild) data.append(table());
    data.hidden = !data.hidden;
    drawing.hidden = !data.hidden;
    button.setAttribute("aria-pressed", String(!data.hidden));
  } }, "table");
  return h("section", { id }, h("div", { class: "head" }, h("h2", {}, title), h("p", {}, words), button), drawing, data);
}

export function table(columns, rows) {
  const side = (i) => (columns[i].right ? { class: "right" } : {});
  return h("table", {},
    h("thead", {}, h("tr", {}, columns.map((column, i) => h("th", side(i), column.name ?? column)))),
    h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell, i) => h("td", side(i), String(cell ?? "")))))));
}

export const right = (name) => ({ name, right: true });

const tip = h("div", { class: "tip", role: "status", hidden: true });
document.body.append(tip);

export function showTip(text, event) {
  tip.textContent = text;
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.min(event.clientX + 14, innerWidth - width - 8)}px`;
  tip.style.top = `${event.clientY + 18 + height > innerHeight ? event.clientY - height - 10 : event.clientY + 18}px`;
}

export function hideTip() {
  tip.hidden = true;
}

export const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
