// The list of labelled rows: what each labeler says, both responses, every vote.
{
  const several = data.labelers.length > 1;
  const of = field(data.vote);

  // What the chosen labeler says of a row, or all of them.
  const results = (row, chosen) =>
    (chosen.labeler ? [row.results[Number(chosen.labeler)]] : row.results).filter((result) => result !== null);

  const disagreements = (row, chosen) => new Set([...row.disagree, ...results(row, chosen).flatMap((result) => result.disagree)]);

  const against = {
    right: (row, chosen) => results(row, chosen).some((result) => result.right === true),
    wrong: (row, chosen) => results(row, chosen).some((result) => result.right === false),
    none: (row, chosen) => row.human !== null && results(row, chosen).some((result) => result.label === null),
    unjudged: (row) => row.human === null,
  };

  const labeler = {
    name: "labeler",
    title: "Labeler",
    options: [ANY, ...data.labelers.map((name, n) => [String(n), name])],
    keeps: (row, value, chosen) => results(row, chosen).length > 0,
  };
  const status = {
    name: "status",
    title: "Status",
    options: STATUS,
    keeps: (row, value, chosen) => results(row, chosen).some((result) => result.status === value),
  };
  const human = {
    name: "human",
    title: "Against human",
    options: [ANY, ["right", "right"], ["wrong", "wrong label"], ["none", "no label"], ["unjudged", "no human label"]],
    keeps: (row, value, chosen) => against[value](row, chosen),
  };
  const disagreement = {
    name: "disagreement",
    title: "Disagreement",
    options: [ANY, ["labelers", "labelers disagree"], ["principles", "principles disagree"], ["orders", "orders disagree"],
      ["nothing", "nothing disagrees"]],
    keeps: (row, value, chosen) =>
      (value === "nothing" ? disagreements(row, chosen).size === 0 : disagreements(row, chosen).has(value)),
  };

  function confidence(row, chosen) {
    const softs = results(row, chosen).map((result) => result.soft).filter((soft) => soft !== null);
    return softs.length ? Math.max(...softs.map((soft) => Math.abs(soft - 0.5))) : null;
  }

  function verdict(result) {
    if (result === null) return make("span", { class: "soft", text: "not in this file" });
    if (result.label === null) return make("span", { class: "failed", text: result.status });
    const sign = { true: "✓ ", false: "✗ " }[result.right] || "";
    const kind = { true: "right", false: "wrong" }[result.right] || "";
    return make("span", {}, make("b", { class: kind, text: sign + result.label }), " ",
      make("span", { class: "soft", text: decimals(result.soft) }));
  }

  const texts = (row) => [row.a, row.b, ...row.results.filter(Boolean).flatMap((result) => [result.error,
    ...result.votes.flatMap((vote) => ["text", "rationale", "error", "principle", "labeler"].map((name) => of(vote, name)))])];

  // ---------------------------------------------------------------- one row

  function detail(row) {
    const side = (name, text) => ({
      name: `response-${name}`,
      title: `Response ${name.toUpperCase()}` + (row.human === name ? ", preferred by humans" : ""),
      text,
    });
    const parts = sideBySide(side("a", row.a), side("b", row.b));
    if (data.human) {
      const votes = row.humans.length > 1 ? ` (votes: ${row.humans.join(", ")})` : "";
      const said = row.human || (row.humans.length ? "no majority" : "none");
      parts.push(make("h4", { text: "Human label" }), make("div", { class: "text", text: said + votes }));
    }
    return [...parts, ...row.results.flatMap((result, n) => judgement(data.labelers[n], result))];
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
    const has = (name) => votes.some((vote) => of(vote, name) !== null);
    const columns = [["labeler", "labeler"], ["principle", "principle"], ["order", "order"], ["sample", "sample"],
      ["status", "status"], ["soft_label", "P(A)"], ["text", "answer"], ["tokens", "tokens"]]
      .filter(([name]) => !["labeler", "principle"].includes(name) || has(name))
      .filter(([name]) => name !== "sample" || votes.some((vote) => of(vote, "sample") > 0));
    const table = make("table", { class: "votes" },
      make("thead", {}, make("tr", {}, ...columns.map(([, title]) => make("th", { scope: "col", text: title })))));
    const body = make("tbody", {});
    for (const vote of votes) {
      const more = ["rationale", "error"].filter((name) => of(vote, name));
      body.append(make("tr", { class: more.length ? "with-more" : "" }, ...columns.map(([name]) => voteCell(vote, name))));
      for (const name of more) {
        const said = make("span", { class: name === "error" ? "said failed" : "said", dir: "auto", text: of(vote, name) });
        body.append(make("tr", { class: `more ${name}` }, make("td", { colspan: columns.length },
          make("span", { class: "soft", text: `${name}: ` }), said)));
      }
    }
    table.append(body);
    return table;
  }

  function voteCell(vote, name) {
    if (name === "tokens") {
      const spent = ["prompt_tokens", "completion_tokens"].map((part) => of(vote, part) || 0);
      return make("td", { class: "soft", text: spent.join(" + ") });
    }
    const value = of(vote, name);
    if (name === "soft_label") return make("td", { class: "soft", text: decimals(value) });
    if (name === "order") return make("td", { text: { ab: "A, B", ba: "B, A" }[value] || String(value) });
    if (name === "status") return make("td", { class: value === "ok" || value === "tie" ? "" : "failed", text: value || "–" });
    return make("td", { class: name === "text" ? "said" : "", dir: "auto", text: value === null ? "–" : value });
  }

  // ---------------------------------------------------------------- the page

  function differing(row) {
    const all = new Set([...row.disagree, ...row.results.flatMap((result) => (result ? result.disagree : []))]);
    return [...all].map(tag);
  }

  const verdicts = data.labelers.map((name, n) =>
    ({ title: several ? name : "label, P(A)", name: "label", fill: (row) => [verdict(row.results[n])] }));

  listRows({
    filters: [...(several ? [labeler] : []), status, ...(data.human ? [human] : []), disagreement],
    orders: [
      { value: "sure", text: "most confident first", by: (row, chosen) => minus(confidence(row, chosen)) },
      { value: "unsure", text: "least confident first", by: confidence },
    ],
    columns: [
      { title: "prompt", fill: (row) => [snippet(row.prompt)] },
      ...(data.human ? [{ title: "human", name: "human", fill: (row) => [row.human || "–"] }] : []),
      ...verdicts,
      { title: "disagree", name: "differ", fill: differing },
    ],
    width: 24 + 7.2 * data.labelers.length,
    hint: "prompt, responses, rationales, answers, id",
    texts,
    detail,
  });
}
