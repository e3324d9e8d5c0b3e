// The list of revised rows: the response beside what became of it, and every round of critique and revision.
{
  const of = field(data.round);

  // A row's rounds that have the chosen principle, or all of them.
  const rounds = (row, chosen) => row.rounds.filter((one) => !chosen.principle || of(one, "principle") === chosen.principle);

  const status = {
    name: "status",
    title: "Status",
    options: STATUS,
    keeps: (row, value) => row.status === value,
  };
  const principle = {
    name: "principle",
    title: "Principle",
    options: [ANY, ...data.principles.map((name) => [name, name])],
    keeps: (row, value, chosen) => rounds(row, chosen).length > 0,
  };
  const revision = {
    name: "revision",
    title: "Revisions",
    options: [ANY, ["unchanged", "unchanged somewhere"], ["refusal", "declines somewhere"], ["neither", "neither"]],
    keeps: (row, value, chosen) => (value === "neither"
      ? !rounds(row, chosen).some((one) => of(one, "unchanged") || of(one, "refusal"))
      : rounds(row, chosen).some((one) => of(one, value))),
  };

  function statusOf(row) {
    if (row.status === "ok") return make("span", { text: "ok" });
    const last = row.rounds.length ? ` in round ${of(row.rounds[row.rounds.length - 1], "round")}` : "";
    return make("span", { class: "failed", text: row.status + last });
  }

  const tags = (unchanged, refusal) => [...(unchanged ? [tag("unchanged")] : []), ...(refusal ? [tag("declines")] : [])];
  const some = (row, name) => row.rounds.some((one) => of(one, name));

  const texts = (row) => [row.response, row.revised, row.error,
    ...row.rounds.flatMap((one) => ["principle", "critique", "revision", "text", "error"].map((name) => of(one, name)))];

  // ---------------------------------------------------------------- one row

  function detail(row) {
    const revised = row.revised === null ? `No final revision: ${row.status}` : "Final revision";
    const parts = sideBySide(
      { name: "before", title: "Original response", text: row.response },
      { name: "after", title: revised, text: row.revised },
    );
    if (row.error) parts.push(make("div", { class: "text failed", text: row.error }));
    if (!row.rounds.length) parts.push(make("p", { class: "note", text: "No round is stored." }));
    let before = row.response;
    for (const one of row.rounds) {
      parts.push(round(one, before));
      before = of(one, "revision");
    }
    return parts;
  }

  function round(one, before) {
    const failed = of(one, "status") !== "ok";
    const facts = [`${of(one, "completion_tokens")} tokens written`];
    if (of(one, "change") !== null) facts.unshift(`${decimals(of(one, "change"))} changed`);
    const head = make("h4", {}, make("b", { text: `Round ${of(one, "round")}` }),
      ...(of(one, "principle") === null ? [] : [" ", make("span", { class: "principle", text: of(one, "principle") })]),
      " ", make("span", { class: failed ? "failed" : "right", text: of(one, "status") }), " ",
      ...tags(of(one, "unchanged"), of(one, "refusal")), make("span", { class: "soft", text: facts.join(", ") }));
    const error = of(one, "error") ? make("div", { class: "text failed", text: of(one, "error") }) : null;
    const said = failed ? failure(one) : [...critique(one), made(one, before)];
    return make("section", { class: "round" }, head, error, make("div", { class: "pair" }, ...said));
  }

  const block = (name, title, ...texts) => make("div", { class: name }, make("h5", { text: title }), ...texts);

  function critique(one) {
    const said = of(one, "critique");
    return said === null ? [] : [block("critique", data.principles.length ? "Critique" : "Reasoning", textBlock(said))];
  }

  // What failed, as it was said; a critique that failed is there as such too.
  function failure(one) {
    const said = of(one, "critique");
    const first = said !== null && (said === "" || said === of(one, "text"));
    const raw = block("raw", `${first ? "Critique" : "Revision"}, which failed: raw text`, textBlock(of(one, "text") || null));
    return first ? [raw] : [...critique(one), raw];
  }

  function made(one, before) {
    const text = of(one, "revision");
    const changes = before === null || text === null ? [textBlock(text)] : changesIn(before, text);
    return block("after revision", "Revision", ...changes);
  }

  // ---------------------------------------------------------------- the page

  listRows({
    filters: [status, revision, ...(data.principles.length ? [principle] : [])],
    orders: [
      { value: "most", text: "most changed first", by: (row) => minus(row.change) },
      { value: "least", text: "least changed first", by: (row) => row.change },
    ],
    columns: [
      { title: "prompt", fill: (row) => [snippet(row.prompt)] },
      { title: "status", name: "status", fill: (row) => [statusOf(row)] },
      { title: "rounds", name: "count", fill: (row) => [String(row.rounds.length)] },
      { title: "changed", name: "count", fill: (row) => [make("span", { class: "soft", text: decimals(row.change) })] },
      { title: "revisions", name: "differ", fill: (row) => tags(some(row, "unchanged"), some(row, "refusal")) },
    ],
    width: 36,
    hint: "prompt, responses, critiques, revisions, principles, id",
    texts,
    detail,
  });
}
