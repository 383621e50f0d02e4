// Several students side by side: on one text, on the units that match one unit, on how much of one lives in another, on a class.
"use strict";
(() => {
  const { mxd } = window;
  const { h, ui, fmt, heat, charts } = mxd;
  const MOST = 4;
  const SCALE = 2; // nats; as in Sentence
  const EACH = 3;
  const MOST_PROBED = 1000;
  let now = null;
  const by = (name) => now.ctx.run.students.find((s) => s.name === name);
  const section = (title, ...parts) => h("section", { class: "panel" }, h("h2", null, title), parts);
  const failing = (el, again) => (error) => !mxd.aborted(error) && el.replaceChildren(ui.failed(error, again));
  const units = () => now.chosen.filter((name) => by(name).store);

  // ---- one text -------------------------------------------------------------------------------------------------------------
  function read(body) {
    const { lines, ask, chosen } = now;
    now.body = body;
    mxd.setQuery({ text: body.text, seq: body.seq });
    lines.replaceChildren(ui.loading(200));
    ask((signal) => mxd.source.sentence({ ...body, students: chosen }, { signal }), (answer) => {
      const { tokens, mean_from: from } = answer;
      now.form.area.value = tokens.special.includes(0) ? tokens.text.slice(tokens.cuts[1]) : tokens.text;
      const line = (student) => {
        const deltas = mxd.deltas(answer, student);
        const { mean, half, n } = mxd.meanOf(deltas, from);
        const kl = mxd.meanOf(student.kl, from).mean;
        const said = `Δ ${fmt.nats(mean)} ± ${fmt.num(half, 2)} nats a token, mean of ${n}; KL ${fmt.num(kl, 2)}`;
        const tip = (t) => [`position ${t} · #${tokens.ids[t]}`, deltas[t] === null ? "first token: no loss"
          : `host ${fmt.num(answer.host.loss[t])}, ${student.name} ${fmt.num(student.loss[t])}, Δ ${fmt.nats(deltas[t])} nats`];
        return h("section", { "aria-label": student.name },
          h("h3", null, student.name, " ", h("small", null, said)),
          heat.tokens(tokens, deltas, { scale: SCALE, tip, label: `${student.name}, loss less the host's` }));
      };
      lines.replaceChildren(heat.legend({ scale: SCALE, unit: "nats", both: true, name: "student less host: orange is worse" }),
        ...answer.students.map(line));
    }, (error) => lines.replaceChildren(ui.failed(error, () => read(body))));
  }

  // ---- the matches of one unit ----------------------------------------------------------------------------------------------
  async function match(unit) {
    const { found, ctx } = now;
    const name = ctx.student.name;
    mxd.setQuery({ unit });
    found.replaceChildren(ui.loading(160));
    try {
      const mine = await mxd.source.unit(name, unit, { signal: ctx.signal });
      const others = now.chosen.filter((other) => other !== name);
      const near = mine.matches.filter((m) => others.includes(m.student));
      const best = others.map((other) => near.find((m) => m.student === other)).filter(Boolean);
      const table = mxd.smallTable(`matches of ${mxd.word(ctx.student)} ${unit} of ${name}`, ["unit", "of", "Jaccard", "r"],
        near.map((m) => [mxd.unitLink(m.student, m.unit, m.label), m.student, fmt.num(m.jaccard, 2), fmt.num(m.corr, 2)]));
      const side = h("div", { class: "cols" });
      const button = ui.button("contexts side by side", () => together([{ student: name, unit }, ...best], side),
        { "aria-expanded": "false" });
      button.addEventListener("click", () => button.setAttribute("aria-expanded", "true"));
      found.replaceChildren(near.length ? table : h("p", { class: "soft" },
        "None of the chosen students has a unit that fires on its tokens."), best.length ? h("p", null, button) : "", side);
    } catch (error) {
      failing(found, () => match(unit))(error);
    }
  }
  async function together(pairs, side) {
    side.replaceChildren(ui.loading(160));
    try {
      const all = await Promise.all(pairs.map(({ student, unit }) => mxd.source.unit(student, unit, { signal: now.ctx.signal })));
      side.replaceChildren(...all.map((one) => {
        const max = one.columns.max_a;
        const shown = one.bands.filter((b) => b.band < 3).flatMap((b) => b.contexts.slice(0, EACH));
        const row = (c) => h("p", null, h("span", { class: "num soft" }, `${fmt.num(c.a)} `), heat.context(c, { width: 10, max }));
        return h("section", { class: "stack" }, h("h3", null, `${one.student} `,
          mxd.unitLink(one.student, one.unit, one.labels.length ? one.labels[0].text : null)),
          h("p", { class: "soft" }, `fires ${fmt.rate(one.columns.fires, one.tokens)}, max a ${fmt.num(max)}`), shown.map(row));
      }));
    } catch (error) {
      failing(side, () => together(pairs, side))(error);
    }
  }

  // ---- how much of one lives in another -------------------------------------------------------------------------------------
  async function curves() {
    const { shared, ctx } = now;
    const names = units();
    if (names.length < 2) return void shared.replaceChildren(h("p", { class: "soft" }, "Two collected students with units are needed."));
    shared.replaceChildren(ui.loading(250));
    try {
      const answers = await Promise.all(names.map((name) => mxd.source.matches(name, { signal: ctx.signal })));
      const pairs = names.flatMap((a, i) => names.filter((b) => b !== a).map((b) => ({ a, b, ...answers[i].students[b] }))).filter((p) =>
        p.best && p.best.length);
      const drawn = pairs.filter((p) => p.a === ctx.student.name || p.b === ctx.student.name);
      const points = ({ best }) => Array.from({ length: 101 }, (_, x) => [x / 100, best.filter((v) => v >= x / 100).length / best.length]);
      const kinds = new Map(names.map((name, i) => [name, `s${i + 1}`]));
      const series = drawn.map((p) => ({ name: p.a === ctx.student.name ? `→ ${p.b}` : `← ${p.a}`,
        kind: kinds.get(p.a === ctx.student.name ? p.b : p.a), dash: p.a !== ctx.student.name, points: points(p) }));
      const rows = pairs.map((p) => [`${p.a} → ${p.b}`, fmt.num(p.best[p.best.length >> 1], 2),
        fmt.pct(p.best.filter((v) => v >= 0.5).length / p.best.length), fmt.int(p.without)]);
      shared.replaceChildren(series.length ? charts.curve({ series,
        title: `Units of ${ctx.student.name} with a match elsewhere (→), and units elsewhere with a match in it (←)`,
        x: { label: "best Jaccard index, at least", low: 0, high: 1 }, y: { label: "share of live units", low: 0, high: 1 } })
          : h("p", { class: "soft" }, "No matches were collected."),
      rows.length ? mxd.smallTable("A → B: for each live unit of A, its best match in B",
        ["A → B", "median Jaccard", "at least .5", "no match (< .1)"], rows) : "");
    } catch (error) {
      failing(shared, curves)(error);
    }
  }

  // ---- classes of the probes ------------------------------------------------------------------------------------------------
  /** The best unit for each class that probes were run on: Map("task: class" -> {unit, label, f1, n}); asked for once per student. */
  async function detectors(name) {
    const data = await mxd.columns(name);
    const f1 = data.get("probe_f1");
    const chosen = [...data.units].filter((u) => f1[u] > 0).sort((a, b) => f1[b] - f1[a]).slice(0, MOST_PROBED);
    const best = new Map();
    for (let i = 0; i < chosen.length; i += 200) {
      for (const row of (await mxd.source.rows(name, chosen.slice(i, i + 200))).units) {
        for (const p of row.probes) {
          const key = `${p.task}: ${p.class}`;
          if (!best.has(key) || best.get(key).f1 < p.f1) best.set(key, { ...p, unit: row.unit, label: row.label && row.label.text });
        }
      }
    }
    return best;
  }
  async function classes() {
    const { probes, known } = now;
    const names = units();
    probes.replaceChildren(ui.loading(100));
    try {
      for (const name of names) if (!known.has(name)) known.set(name, await detectors(name));
      if (!now || names.join() !== units().join()) return;
      const rows = new Map();
      for (const name of names) for (const [key, p] of known.get(name)) rows.set(key, (rows.get(key) || new Map()).set(name, p));
      const cell = (p, name) => (p ? [mxd.unitLink(name, p.unit, p.label), ` F1 ${fmt.num(p.f1, 2)} (n ${fmt.int(p.n)})`]
        : fmt.dash("no unit of it was chosen for this class"));
      probes.replaceChildren(rows.size ? mxd.smallTable("the unit that alone tells the class best", ["class", ...names],
        [...rows].sort(([a], [b]) => a.localeCompare(b))
        .map(([key, found]) => [heat.text(key), ...names.map((name) => cell(found.get(name), name))]))
          : ui.empty("No probe is known that a single unit of these students passes.", `mxd eval runs/${now.ctx.run.name} --suite full`));
    } catch (error) {
      failing(probes, classes)(error);
    }
  }

  // ---- the view -------------------------------------------------------------------------------------------------------------
  function take({ query }) {
    const { ctx } = now;
    const known = ctx.run.students.filter((s) => s.name !== ctx.student.name).map((s) => s.name);
    const asked = (query.get("with") || "").split(",").filter((name) => known.includes(name));
    const first = known.filter((name) => by(name).store).concat(known);
    now.chosen = [ctx.student.name, ...(asked.length ? asked : first.slice(0, 1))].slice(0, MOST);
    drawPick();
    refresh();
    const unit = query.get("unit");
    if (unit !== null && unit !== "") {
      now.unit.value = unit;
      match(Number(unit));
    }
    if (query.has("seq")) read({ seq: Number(query.get("seq")) });
    else if (query.has("text")) read({ text: query.get("text") });
    else mxd.beginWith(now.lines, ctx.run, read);
  }
  function drawPick() {
    const { ctx, chosen, pick } = now;
    const box = (s) => {
      const fixed = s.name === ctx.student.name;
      const on = chosen.includes(s.name);
      const change = (event) => {
        now.chosen = event.target.checked ? [...chosen, s.name] : chosen.filter((name) => name !== s.name);
        mxd.setQuery({ with: now.chosen.slice(1).join(",") });
        drawPick();
        pick.querySelector(`[value="${CSS.escape(s.name)}"]`).focus();
        refresh();
        if (now.body) read(now.body);
        if (now.unit.value) match(Number(now.unit.value));
      };
      const off = fixed || (on && chosen.length <= 2) || (!on && chosen.length >= MOST);
      return h("label", { class: "check" }, h("input", { type: "checkbox", value: s.name, checked: on, disabled: off, on: { change } }),
        s.name, fixed ? h("small", null, "(the one picked above)") : null);
    };
    pick.replaceChildren(h("legend", { class: "sr" }, `2 to ${MOST} students`), ...ctx.run.students.map(box));
  }
  function refresh() {
    curves();
    classes();
  }
  mxd.view("compare", {
    title: "Compare",
    mount(el, route, ctx) {
      if (ctx.run.students.length < 2) return void el.append(ui.empty("This run has one student: there is nothing to compare it with."));
      const stack = () => h("div", { class: "stack" });
      const form = mxd.textForm((text) => read({ text }), ctx.signal);
      now = { ctx, form, ask: mxd.latest(), pick: h("fieldset", { class: "line" }), lines: stack(), found: stack(), shared: stack(),
        probes: stack(), known: new Map(), body: null,
        unit: h("input", { type: "number", class: "short", min: 0, max: ctx.student.n_units - 1, step: 1, required: true,
          placeholder: "number", "aria-label": `number of the ${mxd.word(ctx.student)}` }) };
      const go = (event) => (event.preventDefault(), match(Number(now.unit.value)));
      el.append(h("h1", { class: "sr" }, "Compare"), now.pick, section("On the same text", mxd.source.live && form.el, now.lines),
        ctx.student.store ? section(`Matches of one ${mxd.word(ctx.student)}`,
          h("form", { class: "line", on: { submit: go } }, now.unit, h("button", { type: "submit" }, "Find")), now.found) : "",
        section("How much of one lives in another", now.shared), section("By class", now.probes));
      take(route);
      return () => (now.ask.cancel(), (now = null));
    },
    update: take,
  });
})();
