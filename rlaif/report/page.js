"use strict";
// What every page has: elements, and a list of rows to filter, to turn and to open. A kind of page says what its list holds
// (see `listRows`). Texts are set as text nodes only; nothing here makes markup of a string.

const data = JSON.parse(document.getElementById("data").textContent);
const PER_PAGE = 25;
const query = (selector) => document.querySelector(selector);

// ---------------------------------------------------------------- elements

// Control characters become their pictures and lone surrogates U+FFFD, so that what is there is seen.
const visible = (text) => String(text)
  .replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)))
  .replace(/\p{Surrogate}/gu, "\ufffd");

function make(tag, options, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(options || {})) {
    if (name === "text") element.textContent = visible(value);
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

const textBlock = (text) => make("pre", { class: "text", dir: "auto", text: text === null ? "(nothing)" : text });
const snippet = (text) => make("span", { class: "snippet", dir: "auto", text: (text || "").slice(0, 300) });
const tag = (text) => make("span", { class: "tag", text });
const decimals = (value) => (value === null ? "–" : value.toFixed(3));
const minus = (value) => (value === null ? null : -value);

const ANY = ["", "any"];
const STATUS = [ANY, ...data.statuses.map((name) => [name, name])];

// Rows as arrays of values, read by their names: field(["status", "text"])(row, "text").
function field(names) {
  const place = Object.fromEntries(names.map((name, n) => [name, n]));
  return (values, name) => values[place[name]];
}

// ---------------------------------------------------------------- the list of rows

// What a kind of page says of its list:
//   filters: [{ name, title, options: [[value, text], …], keeps: (row, value, chosen) => whether it stays }]
//   orders: [{ value, text, by: (row, chosen) => number or null }], least first, null last
//   columns: [{ title, name: class, fill: (row) => children of its cell }], after the first, which is the row's id
//   width: the least width of the list in rem
//   texts: (row) => texts to search; hint: what they are
//   detail: (row) => children of what is shown when a row is opened
// `chosen` has the value of every filter by its name, "" for any.
function listRows(kind) {
  if (!query("#list")) return; // there are no rows
  const open = new Set();
  const searchable = new Map();
  let found = data.rows;
  let page = 0;

  function makeForm() {
    const form = query("#filters");
    const orders = [["", "as in the file"], ...kind.orders.map(({ value, text }) => [value, text])];
    for (const { name, title, options } of [...kind.filters, { name: "order", title: "Order", options: orders }]) {
      const select = make("select", { id: `by-${name}` }, ...options.map(([value, text]) => make("option", { value, text })));
      select.addEventListener("change", apply);
      form.append(make("label", { text: title }, select));
    }
    const search = make("input", { id: "search", type: "search", placeholder: kind.hint });
    let waiting = 0;
    search.addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(apply, 150);
    });
    form.append(make("label", { class: "search", text: "Search" }, search));
    form.addEventListener("submit", (event) => event.preventDefault());
  }

  function makeHead() {
    const columns = [{ title: "id", name: "id" }, ...kind.columns];
    const cells = columns.map(({ title, name }) => make("th", { class: name || "", scope: "col", text: title }));
    query("#list thead").append(make("tr", {}, ...cells));
    query("#list").style.minWidth = `${kind.width}rem`; // or the prompt would get what is left: nothing
  }

  function apply() {
    const chosen = Object.fromEntries(kind.filters.map(({ name }) => [name, query(`#by-${name}`).value]));
    const wanted = query("#search").value.trim().toLowerCase();
    found = data.rows.filter((row) =>
      kind.filters.every(({ name, keeps }) => !chosen[name] || keeps(row, chosen[name], chosen)) &&
      (!wanted || searched(row).includes(wanted)));
    const order = kind.orders.find(({ value }) => value === query("#by-order").value);
    if (order) {
      const by = new Map(found.map((row) => [row, order.by(row, chosen)]));
      found.sort((x, y) => (by.get(x) === null) - (by.get(y) === null) || by.get(x) - by.get(y));
    }
    page = 0;
    show();
  }

  function searched(row) {
    if (!searchable.has(row)) {
      searchable.set(row, [row.id, row.prompt, ...kind.texts(row)].filter(Boolean).join("\n").toLowerCase());
    }
    return searchable.get(row);
  }

  function listed(row) {
    const button = make("button", { type: "button", "aria-expanded": String(open.has(row)), text: row.id });
    const cells = kind.columns.map(({ fill }) => make("td", {}, ...fill(row)));
    const line = make("tr", { class: open.has(row) ? "row open" : "row" }, make("td", {}, button), ...cells);
    line.addEventListener("click", () => toggle(row, line, button));
    return line;
  }

  function toggle(row, line, button) {
    const opening = !open.has(row);
    if (opening) {
      open.add(row);
      line.after(detailLine(row));
    } else {
      open.delete(row);
      line.nextElementSibling.remove();
    }
    line.classList.toggle("open", opening);
    button.setAttribute("aria-expanded", String(opening));
  }

  function detailLine(row) {
    const inner = make("div", {}, make("h4", { text: "Prompt" }), textBlock(row.prompt), ...kind.detail(row));
    return make("tr", { class: "opened" }, make("td", { class: "detail", colspan: kind.columns.length + 1 }, inner));
  }

  function show() {
    const last = Math.max(0, Math.ceil(found.length / PER_PAGE) - 1);
    page = Math.min(page, last);
    const from = page * PER_PAGE;
    const shown = found.slice(from, from + PER_PAGE);
    query("#list tbody").replaceChildren(...shown.flatMap((row) => [listed(row), ...(open.has(row) ? [detailLine(row)] : [])]));
    const range = found.length ? `rows ${from + 1} to ${from + shown.length} of ` : "";
    query("#found").textContent = `${range}${found.length} found, ${data.rows.length} listed`;
    const turn = (text, step) => {
      const button = make("button", { type: "button", text });
      button.disabled = page + step < 0 || page + step > last;
      button.addEventListener("click", () => {
        page += step;
        show();
        query("#rows").scrollIntoView();
      });
      return button;
    };
    const where = make("span", { class: "soft", text: `page ${page + 1} of ${last + 1}` });
    query("#pages").replaceChildren(turn("Previous", -1), where, turn("Next", 1));
  }

  makeForm();
  makeHead();
  show();
}
