// The list of samples: what the policy said at which step, and what that was worth.
{
  const step = {
    name: "step",
    title: "Step",
    options: [ANY, ...data.steps.map((number) => [String(number), String(number)])],
    keeps: (row, value) => String(row.step) === value,
  };
  const status = {
    name: "status",
    title: "Status",
    options: STATUS,
    keeps: (row, value) => row.status === value,
  };

  const figure = (value) => make("span", { class: "soft", text: decimals(value) });

  // ---------------------------------------------------------------- one sample

  function detail(row) {
    const facts = [
      ["reward", decimals(row.reward)],
      ...data.terms.filter((name) => name in row.terms).map((name) => [name, decimals(row.terms[name])]),
      ["KL, nats", decimals(row.kl)],
      ["tokens", row.tokens === null ? "–" : String(row.tokens)],
      ["step", String(row.step)],
    ];
    const listed = facts.map(([name, value]) => make("div", {}, make("dt", { text: name }), make("dd", { text: value })));
    return [
      make("h4", { text: row.status === "cut" ? "Response, cut at the most tokens" : "Response" }),
      textBlock(row.response),
      row.error ? make("div", { class: "text failed", text: row.error }) : null,
      make("dl", { class: "facts" }, ...listed),
    ];
  }

  // ---------------------------------------------------------------- the page

  listRows({
    filters: [step, status],
    orders: [
      { value: "best", text: "highest reward first", by: (row) => minus(row.reward) },
      { value: "worst", text: "lowest reward first", by: (row) => row.reward },
      { value: "last", text: "last step first", by: (row) => minus(row.step) },
      { value: "far", text: "greatest KL first", by: (row) => minus(row.kl) },
      { value: "long", text: "longest first", by: (row) => minus(row.tokens) },
    ],
    columns: [
      { title: "prompt", fill: (row) => [snippet(row.prompt)] },
      { title: "response", fill: (row) => [snippet(row.response)] },
      { title: "reward", name: "figure", fill: (row) => [figure(row.reward)] },
      { title: "KL", name: "figure", fill: (row) => [figure(row.kl)] },
      { title: "tokens", name: "figure", fill: (row) => [make("span", { class: "soft", text: row.tokens === null ? "–" : row.tokens })] },
      { title: "status", name: "figure", fill: (row) => [make("span", { class: row.status === "failed" ? "failed" : "", text: row.status })] },
    ],
    width: 44,
    hint: "prompt, response, error, step.number",
    texts: (row) => [row.response, row.error],
    detail,
  });
}
