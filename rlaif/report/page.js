"use strict";
// The list of rows. Texts are set as text nodes only; nothing here makes markup of a string.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const PER_PAGE = 25;
  const MOST_CELLS = 4e6; // of the table that compares two responses
  const STATUSES = ["ok", "tie", "unparsed", "refused", "error"];
  const several = data.labelers.length > 1;
  const column = Object.fromEntries(data.vote.map((name, n) => [name, n]));
  const query = (selector) => document.querySelector(selector);
  const open = new Set();
  let found = data.rows;
  let page = 0;

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
  const decimals = (value) => (value === null ? "–" : value.toFixed(3));

  // ---------------------------------------------------------------- filters

  const any = ["", "any"];
  const filters = {
    labeler: [any, ...data.labelers.map((name, n) => [String(n), name])],
    status: [any, ...STATUSES.map((name) => [name, name])],
    human: [any, ["right", "right"], ["wrong", "wrong label"], ["none", "no label"], ["unjudged", "no human label"]],
    disagreement: [any, ["labelers", "labelers disagree"], ["principles", "principles disagree"], ["orders", "orders disagree"],
      ["nothing", "nothing disagrees"]],
    order: [["", "as in the file"], ["sure", "most confident first"], ["unsure", "least confident first"]],
  };
  const titles = { labeler: "Labeler", status: "Status", human: "Against human", disagreement: "Disagreement", order: "Order" };

  function results(row) {
    const chosen = chosenLabeler();
    return (chosen === null ? row.results : [row.results[chosen]]).filter((result) => result !== null);
  }

  function chosenLabeler() {
    const value = several ? query("#by-labeler").value : "";
    return value === "" ? null : Number(value);
  }

  function disagreements(row) {
    return new Set([...row.disagree, ...results(row).flatMap((result) => result.disagree)]);
  }

  const against = {
    right: (row) => results(row).some((result) => result.right === true),
    wrong: (row) => results(row).some((result) => result.right === false),
    none: (row) => row.human !== null && results(row).some((result) => result.label === null),
    unjudged: (row) => row.human === null,
  };

  function confidence(row) {
    const softs = results(row).map((result) => result.soft).filter((soft) => soft !== null);
    return softs.length ? Math.max(...softs.map((soft) => Math.abs(soft - 0.5))) : null;
  }

  const texts = new Map();
  function searchable(row) {
    if (!texts.has(row)) {
      const votes = row.results.filter(Boolean).flatMap((result) => [result.error, ...result.votes.flatMap((vote) =>
        ["text", "rationale", "error", "principle", "labeler"].map((name) => vote[column[name]]))]);
      texts.set(row, [row.id, row.prompt, row.a, row.b, ...votes].filter(Boolean).join("\n").toLowerCase());
    }
    return texts.get(row);
  }

  function applyFilters() {
    const status = query("#by-status").value;
    const human = data.human ? query("#by-human").value : "";
    const differ = query("#by-disagreement").value;
    const order = query("#by-order").value;
    const wanted = query("#search").value.trim().toLowerCase();
    found = data.rows.filter((row) =>
      results(row).length > 0 &&
      (!status || results(row).some((result) => result.status === status)) &&
      (!human || against[human](row)) &&
      (!differ || (differ === "nothing" ? disagreements(row).size === 0 : disagreements(row).has(differ))) &&
      (!wanted || searchable(row).includes(wanted)));
    if (order) {
      const sign = order === "sure" ? -1 : 1;
      const by = new Map(found.map((row) => [row, confidence(row)]));
      found = [...found].sort((x, y) => (by.get(x) === null) - (by.get(y) === null) || sign * (by.get(x) - by.get(y)));
    }
    page = 0;
    show();
  }

  function makeFilters() {
    const form = query("#filters");
    for (const [name, options] of Object.entries(filters)) {
      if ((name === "labeler" && !several) || (name === "human" && !data.human)) continue;
      const select = make("select", { id: `by-${name}` }, ...options.map(([value, text]) => make("option", { value, text })));
      select.addEventListener("change", applyFilters);
      form.append(make("label", { text: titles[name] }, select));
    }
    const search = make("input", { id: "search", type: "search", placeholder: "prompt, responses, rationales, answers, id" });
    let waiting = 0;
    search.addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(applyFilters, 150);
    });
    form.append(make("label", { class: "search", text: "Search" }, search));
    form.addEventListener("submit", (event) => event.preventDefault());
  }

  // ---------------------------------------------------------------- the list

  function makeHead() {
    const cells = [make("th", { class: "id", scope: "col", text: "id" }), make("th", { scope: "col", text: "prompt" })];
    if (data.human) cells.push(make("th", { class: "human", scope: "col", text: "human" }));
    for (const name of data.labelers) cells.push(make("th", { class: "label", scope: "col", text: several ? name : "label, P(A)" }));
    cells.push(make("th", { class: "differ", scope: "col", text: "disagree" }));
    query("#list thead").append(make("tr", {}, ...cells));
    query("#list").style.minWidth = `${24 + 7.2 * data.labelers.length}rem`; // or the prompt would get what is left: nothing
  }

  function verdict(result) {
    if (result === null) return make("span", { class: "soft", text: "not in this file" });
    if (result.label === null) return make("span", { class: "failed", text: result.status });
    const sign = { true: "✓ ", false: "✗ " }[result.right] || "";
    const kind = { true: "right", false: "wrong" }[result.right] || "";
    return make("span", {}, make("b", { class: kind, text: sign + result.label }), " ",
      make("span", { class: "soft", text: decimals(result.soft) }));
  }

  function listed(row) {
    const isOpen = open.has(row);
    const button = make("button", { type: "button", "aria-expanded": String(isOpen), text: row.id });
    const line = make("tr", { class: isOpen ? "row open" : "row" }, make("td", {}, button),
      make("td", {}, make("span", { class: "snippet", dir: "auto", text: (row.prompt || "").slice(0, 300) })));
    if (data.human) line.append(make("td", { text: row.human || "–" }));
    for (const result of row.results) line.append(make("td", {}, verdict(result)));
    const all = new Set([...row.disagree, ...row.results.flatMap((result) => (result ? result.disagree : []))]);
    line.append(make("td", {}, ...[...all].map((name) => make("span", { class: "tag", text: name }))));
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
    const wide = query("#list thead tr").children.length;
    return make("tr", { class: "opened" }, make("td", { class: "detail", colspan: wide }, detail(row)));
  }

  function show() {
    const body = query("#list tbody");
    const last = Math.max(0, Math.ceil(found.length / PER_PAGE) - 1);
    page = Math.min(page, last);
    const from = page * PER_PAGE;
    const shown = found.slice(from, from + PER_PAGE);
    body.replaceChildren(...shown.flatMap((row) => (open.has(row) ? [listed(row), detailLine(row)] : [listed(row)])));
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

  // ---------------------------------------------------------------- one row

  function detail(row) {
    const inner = make("div", {});
    const [pieces, coarse] = differences(row.a || "", row.b || "");
    const side = (name, text, marked) => make("div", { class: `response-${name}` },
      make("h4", { text: `Response ${name.toUpperCase()}` + (row.human === name ? ", preferred by humans" : "") }),
      text === null ? textBlock(null) : marks(text, marked));
    inner.append(make("h4", { text: "Prompt" }), textBlock(row.prompt),
      make("div", { class: "pair" }, side("a", row.a, pieces[0]), side("b", row.b, pieces[1])));
    if (coarse) inner.append(make("p", { class: "note", text: coarse }));
    if (data.human) {
      const votes = row.humans.length > 1 ? ` (votes: ${row.humans.join(", ")})` : "";
      const said = row.human || (row.humans.length ? "no majority" : "none");
      inner.append(make("h4", { text: "Human label" }), make("div", { class: "text", text: said + votes }));
    }
    row.results.forEach((result, n) => inner.append(...judgement(data.labelers[n], result)));
    return inner;
  }

  function judgement(name, result) {
    const parts = [make("h4", { text: name }), make("div", {}, verdict(result))];
    if (result === null) return parts;
    if (result.error) parts.push(make("div", { class: "text failed", text: result.error }));
    if (result.votes.length) parts.push(make("div", { class: "wide" }, votesTable(result.votes)));
    else parts.push(make("p", { class: "note", text: "No vote is stored." }));
    return parts;
  }

  function votesTable(votes) {
    const has = (name) => votes.some((vote) => vote[column[name]] !== null);
    const columns = [["labeler", "labeler"], ["principle", "principle"], ["order", "order"], ["sample", "sample"],
      ["status", "status"], ["soft_label", "P(A)"], ["text", "answer"], ["tokens", "tokens"]]
      .filter(([name]) => !["labeler", "principle"].includes(name) || has(name))
      .filter(([name]) => name !== "sample" || votes.some((vote) => vote[column.sample] > 0));
    const table = make("table", { class: "votes" },
      make("thead", {}, make("tr", {}, ...columns.map(([, title]) => make("th", { scope: "col", text: title })))));
    const body = make("tbody", {});
    for (const vote of votes) {
      const more = ["rationale", "error"].filter((name) => vote[column[name]]);
      body.append(make("tr", { class: more.length ? "with-more" : "" }, ...columns.map(([name]) => voteCell(vote, name))));
      for (const name of more) {
        const said = make("span", { class: name === "error" ? "said failed" : "said", dir: "auto", text: vote[column[name]] });
        body.append(make("tr", { class: `more ${name}` }, make("td", { colspan: columns.length },
          make("span", { class: "soft", text: `${name}: ` }), said)));
      }
    }
    table.append(body);
    return table;
  }

  function voteCell(vote, name) {
    if (name === "tokens") {
      const spent = ["prompt_tokens", "completion_tokens"].map((part) => vote[column[part]] || 0);
      return make("td", { class: "soft", text: spent.join(" + ") });
    }
    const value = vote[column[name]];
    if (name === "soft_label") return make("td", { class: "soft", text: decimals(value) });
    if (name === "order") return make("td", { text: { ab: "A, B", ba: "B, A" }[value] || String(value) });
    if (name === "status") return make("td", { class: value === "ok" || value === "tie" ? "" : "failed", text: value || "–" });
    return make("td", { class: name === "text" ? "said" : "", dir: "auto", text: value === null ? "–" : value });
  }

  // ---------------------------------------------------------------- differences

  const WORDS = /[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Thai}]\s*|[\p{L}\p{M}\p{N}_]+(?:['’][\p{L}]+)*\s*|[^]\s*/gu;
  const SENTENCES = /[^.!?。！？\n]*(?:[.!?。！？\n]+\s*|$)/gu;

  // For each response its pieces as [text, whether the other has it not], and a note where they are not single words.
  function differences(a, b) {
    for (const [units, note] of [[WORDS, ""], [SENTENCES, "These responses are long: whole sentences are compared, not words."]]) {
      const [left, right] = [a, b].map((text) => (text.match(units) || []).filter(Boolean));
      const marked = compare(left, right);
      if (marked) return [marked, note];
    }
    return [[[[a, false]], [[b, false]]], "These responses are too long for their differences to be marked."];
  }

  // The longest common subsequence, after what both begin and end with; null where the table would be too large.
  function compare(left, right) {
    const keys = new Map();
    const number = (word) => {
      const key = word.trimEnd();
      if (!keys.has(key)) keys.set(key, keys.size);
      return keys.get(key);
    };
    const x = left.map(number);
    const y = right.map(number);
    let start = 0;
    while (start < x.length && start < y.length && x[start] === y[start]) start += 1;
    let end = 0;
    while (end < x.length - start && end < y.length - start && x[x.length - 1 - end] === y[y.length - 1 - end]) end += 1;
    const rows = x.length - start - end;
    const columns = y.length - start - end;
    const wide = columns + 1;
    if ((rows + 1) * wide > MOST_CELLS) return null;
    const table = new Uint16Array((rows + 1) * wide);
    for (let i = rows - 1; i >= 0; i -= 1) {
      for (let j = columns - 1; j >= 0; j -= 1) {
        const at = i * wide + j;
        table[at] = x[start + i] === y[start + j] ? table[at + wide + 1] + 1 : Math.max(table[at + wide], table[at + 1]);
      }
    }
    const only = [new Uint8Array(x.length), new Uint8Array(y.length)];
    let i = 0;
    let j = 0;
    while (i < rows || j < columns) {
      const at = i * wide + j;
      if (i < rows && j < columns && x[start + i] === y[start + j]) {
        i += 1;
        j += 1;
      } else if (j >= columns || (i < rows && table[at + wide] >= table[at + 1])) {
        only[0][start + i] = 1;
        i += 1;
      } else {
        only[1][start + j] = 1;
        j += 1;
      }
    }
    return [joined(left, only[0]), joined(right, only[1])];
  }

  function joined(units, only) {
    const pieces = [];
    units.forEach((unit, n) => {
      const last = pieces[pieces.length - 1];
      if (last && last[1] === Boolean(only[n])) last[0] += unit;
      else pieces.push([unit, Boolean(only[n])]);
    });
    return pieces;
  }

  function marks(text, pieces) {
    const block = make("pre", { class: "text", dir: "auto" });
    for (const [piece, only] of pieces) {
      const core = piece.trimEnd(); // the space after a marked word is not part of the mark
      if (only) block.append(make("mark", { text: core }), visible(piece.slice(core.length)));
      else block.append(visible(piece));
    }
    return block;
  }

  makeFilters();
  makeHead();
  show();
})();
