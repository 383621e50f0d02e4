// The bench: a prompt continued by the host, by the student in its place and by the edited student, with the same dice in every lane.
"use strict";
(() => {
  const { mxd } = window;
  const { h, ui, fmt, heat } = mxd;
  const MOST = 8;
  const LIMIT = 1e4;
  const PAPER = 100;
  const OPS = ["add", "set", "scale", "remove"];
  // Names in the address, and the values that are left out there.
  const SETTINGS = { greedy: 1, temp: 1, topp: 1, seed: 0, n: 64, special: 0, control: 0 };
  let now = null;

  // ---- edits: in the address as UNIT:OP:VALUE:AT, joined by commas -----------------------------------------------------------
  const isUnit = (u) => Number.isInteger(u) && u >= 0 && u < now.ctx.student.n_units;
  function parse(text) {
    const found = (text || "").split(",").filter(Boolean).slice(0, MOST).map((one) => {
      const [unit, op, value, at] = one.split(":");
      const number = value === undefined || value === "" || !Number.isFinite(Number(value)) ? null : Number(value);
      return { unit: Number(unit), op: OPS.includes(op) ? op : "add", value: number, at: at === "all" ? "all" : "generated" };
    });
    return found.filter((edit, i) => isUnit(edit.unit) && found.findIndex((other) => other.unit === edit.unit) === i);
  }
  const spell = (edits) => edits.map((e) => `${e.unit}:${e.op}:${e.op === "remove" ? "" : e.value}:${e.at}`).join(",");
  const maxOf = (unit) => (now.max[unit] > 0 ? now.max[unit] : null);
  const first = (edit) => (edit.op === "scale" ? 2 : edit.op === "remove" ? 0 : maxOf(edit.unit)
    ? Number((2 * maxOf(edit.unit)).toPrecision(3)) : 10);
  const words = (e) => (e.op === "remove" ? `remove ${e.unit}` : `${e.op} ${e.unit} ${e.op === "scale" ? "×" : ""}${fmt.num(e.value)}`);

  // ---- the form -------------------------------------------------------------------------------------------------------------
  const field = (text, input) => h("label", { class: "field" }, h("span", null, text), input);
  const pickOf = (label, options, value, change) => h("select",
    { "aria-label": label, on: { change: (event) => change(event.target.value) } },
    options.map((o) => [o].flat()).map(([v, text]) => h("option", { value: v, selected: v === value }, text || v)));
  function changed() {
    const set = now.settings;
    const kept = Object.fromEntries(Object.keys(SETTINGS).map((k) => [k, set[k] === SETTINGS[k] ? null : set[k]]));
    mxd.setQuery({ p: now.prompt.value, e: spell(now.edits) || null, unit: null, ...kept });
  }
  function editRow(edit, i) {
    const max = maxOf(edit.unit);
    const factor = edit.op === "scale";
    const unit = factor ? 1 : max;
    const said = h("output", { class: "num" });
    const raw = h("input", { type: "number", step: "any", min: -LIMIT, max: LIMIT, required: true, "aria-label": `value for ${edit.unit}`,
      class: "short" });
    const slide = h("input", { type: "range", min: edit.op === "add" ? -4 : 0, max: 4, step: 0.1, disabled: !unit,
      "aria-label": `strength of ${edit.unit}` });
    const show = (typing) => {
      const times = unit ? edit.value / unit : null;
      if (typing !== raw) raw.value = edit.value;
      slide.value = times ?? 0;
      said.textContent = factor ? "× its activation" : unit
        ? `= ${edit.op === "add" && times > 0 ? "+" : ""}${fmt.num(times, 2)} × max (${fmt.num(max)})` : "its max is not known";
      slide.setAttribute("aria-valuetext", said.textContent);
    };
    const put = (value, from) => {
      if (!Number.isFinite(value)) return;
      edit.value = Math.max(-LIMIT, Math.min(LIMIT, value));
      show(from);
      changed();
    };
    raw.addEventListener("input", () => raw.value !== "" && put(Number(raw.value), raw));
    slide.addEventListener("input", () => put(Number((Number(slide.value) * unit).toPrecision(4))));
    const op = (name, value) => { edit.op = name; edit.value = value ?? first(edit); changed(); drawEdits(); };
    const away = ui.button("✕", () => { now.edits.splice(i, 1); changed(); drawEdits(); now.add.focus(); },
      { "aria-label": `take away ${words(edit)}` });
    show();
    return h("div", { class: "line", role: "group", "aria-label": `edit of ${edit.unit}` },
      mxd.unitLink(now.ctx.student.name, edit.unit, now.labels.get(edit.unit)),
      pickOf("operation", OPS, edit.op, (v) => op(v)),
      edit.op === "remove" ? null : [slide, raw, said, ui.button("paper: 100", () => op("add", PAPER),
        { title: "what the paper adds to a unit's activation" })],
      pickOf("at which tokens", [["generated", "at generated tokens"], ["all", "at all tokens"]], edit.at,
        (v) => { edit.at = v; changed(); }), away);
  }
  function drawEdits() {
    now.list.replaceChildren(...now.edits.map(editRow));
    now.add.disabled = now.edits.length >= MOST;
    for (const one of now.needEdit) one.hidden = !now.edits.length;
  }
  function addUnit(event) {
    event.preventDefault();
    const unit = Number(now.add.value);
    const twice = now.edits.some((edit) => edit.unit === unit);
    const ok = now.add.value.trim() !== "" && isUnit(unit) && !twice;
    now.add.setCustomValidity(ok ? "" : twice ? "it is edited already" : `a number from 0 to ${now.ctx.student.n_units - 1}`);
    if (!ok || now.edits.length >= MOST) return void now.add.reportValidity();
    const edit = { unit, op: "add", value: null, at: "generated" };
    edit.value = first(edit);
    now.edits.push(edit);
    now.add.value = "";
    changed();
    drawEdits();
    name();
  }
  async function name() {
    const missing = now.edits.map((e) => e.unit).filter((u) => !now.labels.has(u));
    if (!missing.length || !now.ctx.student.store) return;
    const { units } = await mxd.source.rows(now.ctx.student.name, missing, { signal: now.ctx.signal }).catch(() => ({ units: [] }));
    if (!now) return;
    for (const row of units) now.labels.set(row.unit, row.label ? row.label.text : "");
    if (units.length && !now.list.contains(document.activeElement)) drawEdits();
  }
  function form() {
    const set = now.settings;
    const number = (key, text, min, max, step = 1) => field(text,
      h("input", { type: "number", class: "short", min, max, step, value: set[key], required: true, on: { input: (event) => {
      if (event.target.checkValidity()) { set[key] = Number(event.target.value); changed(); }
    } } }));
    const check = (key, text, more) => h("label", { class: "check" },
      h("input", { type: "checkbox", checked: Boolean(set[key]), on: { change: (event) => {
      set[key] = Number(event.target.checked);
      changed();
      if (more) more();
    } } }), text);
    const dice = h("span", { class: "line" }, number("temp", "temperature", 0.05, 5, 0.05), number("topp", "top-p", 0.05, 1, 0.05),
      number("seed", "seed", 0, 2 ** 31 - 1));
    const greedy = () => (dice.hidden = Boolean(set.greedy));
    greedy();
    now.run = h("button", { type: "submit", class: "primary", "data-live": true }, "Run ⏎");
    now.stop = h("button", { type: "button", disabled: true, on: { click: stop } }, "Stop ", h("kbd", null, "Esc"));
    now.dose = h("button", { type: "button", "data-live": true, on: { click: dose } }, "Dose sweep");
    now.save = h("button", { type: "button", "data-live": true, on: { click: saveEdit } }, "Save as edit file");
    const control = check("control", "+ control lane");
    now.needEdit = [now.dose, now.save, control];
    const unit = h("form", { class: "line", on: { submit: addUnit } }, now.add,
      h("button", { type: "submit", class: "small" }, `+ ${mxd.word(now.ctx.student)}`), h("small", null, `at most ${MOST}`));
    const main = h("form", { class: "stack", id: "bench-form", on: { submit: (event) => (event.preventDefault(), run()) } },
      field("prompt", now.prompt));
    const submit = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing && (event.preventDefault(), run());
    now.prompt.addEventListener("keydown", submit);
    now.prompt.addEventListener("input", changed);
    now.add.addEventListener("input", () => now.add.setCustomValidity(""));
    now.run.setAttribute("form", "bench-form");
    return h("section", { class: "panel" }, main, now.ctx.student.n_units ? [now.list, unit]
      : h("p", { class: "soft" }, `${now.ctx.student.name} has no units to edit.`),
      h("div", { class: "controls" }, check("greedy", "greedy", greedy), dice, number("n", "tokens", 1, 256),
        check("special", "read special tokens in the prompt"), control),
      h("div", { class: "line" }, now.run, now.stop, now.dose, now.save,
        ui.button("Copy link", () => { changed(); setTimeout(() => ui.copy(location.href), 350); }), now.status), now.why);
  }

  // ---- a run ----------------------------------------------------------------------------------------------------------------
  function request() {
    const { settings: s, edits, ctx, prompt } = now;
    const lanes = ["host", "replaced", ...(edits.length ? ["steered"] : []), ...(edits.length && s.control ? ["control"] : [])];
    return { student: ctx.student.name, prompt: prompt.value, edits: edits.map((e) => ({ ...e, value: e.op === "remove" ? 0 : e.value })),
      lanes,
      greedy: Boolean(s.greedy), temperature: s.temp, top_p: s.topp, seed: s.seed, tokens: s.n, special: Boolean(s.special) };
  }
  function laneOf(name) {
    const text = h("div", { class: "lane-text live" });
    const foot = h("p", { class: "lane-foot" }, "\u00a0");
    const note = h("small", null);
    const lane = { name, tokens: [], painted: 0, text, foot, note, loss: 0 };
    lane.el = h("section", { class: "lane", "aria-label": name }, h("h3", null, name, " ", note), text, foot);
    heat.walk(text, `${name}, text`);
    return lane;
  }
  function tip(target) {
    const span = target.closest(".t");
    if (!span) return null;
    const i = Number(span.dataset.i);
    const here = now.lanes.find((lane) => lane.text.contains(span));
    const token = here.tokens[i];
    const top = (lane) => lane.tokens[i] && lane.tokens[i].top
      && `${lane.name}: ${lane.tokens[i].top.map(([text, p]) => `${mxd.quoted(text)} ${fmt.num(p, 2)}`).join("  ")}`;
    const differs = span.classList.contains("differs") ? " · differs from the host" : "";
    return [`token ${i} of ${here.name}: ${mxd.quoted(token.text || token.special || "")} #${token.id}${differs}`,
      `p here ${fmt.num(token.p, 2)} · judged by the host ${fmt.num(token.host_loss)} nats`, ...now.lanes.map(top).filter(Boolean)];
  }
  function showLanes(names) {
    now.lanes = names.map(laneOf);
    now.out.replaceChildren(ui.tip(h("div", { class: "lanes" }, now.lanes.map((lane) => lane.el)), tip));
    now.after.replaceChildren();
  }
  /** Append what has arrived; once a frame. A token is compared with the host's once both are there. */
  function paint() {
    now.frame = 0;
    const host = now.lanes.find((lane) => lane.name === "host");
    for (const lane of now.lanes) {
      const fresh = [];
      for (let i = lane.painted; i < lane.tokens.length; i++) {
        const token = lane.tokens[i];
        const differs = lane !== host && host && host.tokens[i] && host.tokens[i].id !== token.id;
        const css = `t${differs ? " differs" : ""}${token.special && !token.text ? " spec" : ""}`;
        fresh.push(h("span", { class: css, "data-i": i }, heat.pieces(token.text || token.special || "")));
      }
      if (!fresh.length) continue;
      lane.text.append(...fresh);
      lane.painted = lane.tokens.length;
      lane.foot.textContent = `${fmt.num(lane.loss / lane.tokens.length)} nats/token so far`;
    }
  }
  function feet(stats) {
    const base = stats.host && stats.host.nats_per_token;
    for (const lane of now.lanes) {
      const s = stats[lane.name];
      if (!s) continue;
      lane.stats = s;
      const more = lane.name === "host" ? "" : ` (${fmt.nats(s.nats_per_token - base)})`;
      const split = lane.name === "host" ? "" : s.splits_at === null ? " · same text as the host"
        : ` · splits from the host at token ${s.splits_at}`;
      const repeats = `repeats ${fmt.pct(s.repeats)} · ${s.tokens} tokens`;
      lane.foot.textContent = `${fmt.num(s.nats_per_token)} nats/token${more} · ${repeats}${split}${s.stopped ? ` · ${s.stopped}` : ""}`;
    }
    return now.lanes.map((l) => l.stats && `${l.name} ${fmt.num(l.stats.nats_per_token)} nats per token`).filter(Boolean).join(", ");
  }
  function onEvent(name, data) {
    const mine = now;
    if (name === "start") {
      now.job = data.job;
      for (const { lane, note } of data.lanes) now.lanes.find((l) => l.name === lane).note.textContent = note || "";
    } else if (name === "token") {
      const lane = now.lanes.find((l) => l.name === data.lane);
      lane.tokens.push(data);
      lane.loss += data.host_loss ?? 0;
      now.frame = now.frame || requestAnimationFrame(() => now === mine && paint());
    } else if (name === "progress") {
      now.status.textContent = `${fmt.num(data.tokens_per_second, 2)} tokens/s, ${Math.ceil(data.seconds_left)} s left`;
    } else if (name === "done") {
      paint();
      ui.announce(`done: ${feet(data.lanes)}`);
    } else if (name === "error") throw new mxd.ApiError(data);
  }
  /** Run what the form says. then(lanes) is called after a run that came to its end. */
  async function run(then) {
    if (now.run.disabled) return;
    if (![...now.el.querySelectorAll("input")].every((input) => input === now.add || input.reportValidity())) return;
    if (now.going) now.going.abort();
    const mine = (now.going = new AbortController());
    const body = request();
    showLanes(body.lanes);
    Object.assign(now, { asked: body, job: null });
    now.stop.disabled = false;
    now.status.textContent = "waiting for the host…";
    ui.announce("running");
    let end = "";
    try {
      await mxd.source.stream(body, (name, data) => now && now.going === mine && onEvent(name, data), mine.signal);
      if (!now || now.going !== mine) return;
      end = mine.stopping ? "stopped" : "";
      now.after.replaceChildren(h("p", null, ui.button("Keep this run", keep, { "data-live": true })));
      if (then) then(now.lanes);
    } catch (error) {
      if (!now || now.going !== mine) return;
      paint();
      end = mxd.aborted(error) ? "stopped" : "";
      const fault = error instanceof mxd.ApiError ? error : new mxd.ApiError({ what: "The server stopped in the middle.", got: error.message });
      if (!end) now.after.replaceChildren(ui.failed(fault, () => run(then)),
        now.lanes[0].tokens.length ? h("p", { class: "soft" }, "What had arrived stays above.") : "");
    }
    now.going = null;
    if (document.activeElement === now.stop) now.run.focus(); // a disabled button would lose the focus
    now.stop.disabled = true;
    now.status.textContent = end;
    if (end) ui.announce(end);
  }
  /** Ask the server to end the run, so that what there is gets its figures; hang up if it doesn't at once. */
  function stop() {
    const { going, job } = now;
    if (!going) return false;
    going.stopping = true;
    now.status.textContent = "stopping…";
    if (job) mxd.source.cancel(job).catch(() => going.abort());
    setTimeout(() => going.abort(), job ? 1000 : 0);
    return true;
  }

  // ---- dose, edit file ------------------------------------------------------------------------------------------------------
  function dose() {
    const { ctx, edits, prompt, settings, dosed } = now;
    const { unit, at, value } = edits[0];
    const max = Math.min(LIMIT / 4, maxOf(unit) || Math.abs(value) || 1);
    mxd.doseSweep(dosed, { student: ctx.student.name, prompt: prompt.value, unit, at, max, special: Boolean(settings.special) },
      ctx.signal);
  }
  async function saveEdit() {
    const { ctx, after } = now;
    try {
      const edit = await mxd.source.edit({ student: ctx.student.name, edits: request().edits }, { signal: ctx.signal });
      const file = `edit-${ctx.student.name}-${now.edits.map((e) => e.unit).join("-")}.json`.replace(/[^\w.-]/g, "_");
      ui.save(`${JSON.stringify(edit, null, 2)}\n`, file);
      after.replaceChildren(h("p", null, `Saved as ${file}; it acts at all tokens. `,
        ui.command(`mxd generate runs/${ctx.run.name} --edit ${file}`)));
    } catch (error) {
      if (!mxd.aborted(error)) after.replaceChildren(ui.failed(error, saveEdit));
    }
  }

  // ---- kept runs ------------------------------------------------------------------------------------------------------------
  async function keep() {
    const lanes = now.lanes.map(({ name, note, stats, tokens }) =>
      ({ lane: name, note: note.textContent, stats, tokens: tokens.map(({ id, text, p, host_loss }) => [id, text, p, host_loss]) }));
    try {
      await mxd.source.saveBench({ student: now.ctx.student.name, request: now.asked, result: { lanes } });
      now.after.replaceChildren(h("p", { class: "soft", role: "status" }, "kept"));
      await kept();
    } catch (error) {
      now.after.replaceChildren(ui.failed(error, keep));
    }
  }
  function showKept({ request: r, result }) {
    if (now.going) now.going.abort();
    now.going = null;
    showLanes(result.lanes.map((l) => l.lane));
    now.lanes.forEach((lane, i) => {
      lane.tokens = result.lanes[i].tokens.map(([id, text, p, host_loss]) => ({ id, text, p, host_loss }));
      lane.note.textContent = result.lanes[i].note || "";
    });
    paint();
    feet(Object.fromEntries(result.lanes.map((l) => [l.lane,
      l.stats || { nats_per_token: NaN, repeats: NaN, splits_at: null, tokens: l.tokens.length }])));
    now.status.textContent = `a kept run: ${r.prompt.slice(0, 60)}`;
    now.out.scrollIntoView({ block: "nearest" });
  }
  function rerun({ request: r, result }) {
    now.prompt.value = r.prompt;
    now.edits = r.edits.map((e) => ({ ...e }));
    Object.assign(now.settings, { greedy: Number(r.greedy), temp: r.temperature, topp: r.top_p, seed: r.seed, n: r.tokens,
      special: Number(r.special), control: Number(r.lanes.includes("control")) });
    now.form.replaceWith((now.form = form()));
    drawEdits();
    now.guard();
    changed();
    run((lanes) => {
      const parted = lanes.map((lane) => {
        const old = result.lanes.find((l) => l.lane === lane.name);
        const n = old ? Math.max(old.tokens.length, lane.tokens.length) : 0;
        const same = (i) => old.tokens[i] && lane.tokens[i] && old.tokens[i][0] === lane.tokens[i].id;
        for (let i = 0; i < n; i++) if (!same(i)) return `${lane.name} from token ${i}`;
        return null;
      }).filter(Boolean);
      const said = parted.length ? `Not the same text as the kept run: ${parted.join(", ")}.`
        : "The same text as the kept run, token by token, in all lanes.";
      now.after.prepend(h("p", { class: parted.length ? "banner warn" : "banner", role: "status" }, said));
    });
  }
  async function kept() {
    const { ctx } = now;
    const { runs } = await mxd.source.benches({ signal: ctx.signal });
    const mine = runs.filter((one) => one.student === ctx.student.name);
    const line = (one) => h("tr", null, h("th", { scope: "row" }, heat.text(one.request.prompt.slice(0, 60) || "(no prompt)")),
      h("td", null, one.request.edits.map(words).join(", ") || "no edit"), h("td", { title: one.created }, fmt.ago(one.created)),
      h("td", { class: "line" }, ui.button("Show", () => showKept(one)),
        mxd.source.live && [ui.button("Rerun", () => rerun(one), { "data-live": true }),
        ui.button("Forget", () => mxd.source.deleteBench(one.id).then(kept, (error) => now.after.replaceChildren(ui.failed(error))),
          { "data-live": true })]));
    if (!now) return;
    now.kept.replaceChildren(h("h2", null, "Kept runs"), mine.length ? h("div", { class: "scroll" }, h("table", { class: "plain" },
      h("thead", null, h("tr", null, ["prompt", "edits", "when"].map((text) => h("th", { scope: "col" }, text)), h("td"))),
        h("tbody", null, mine.map(line))))
      : h("p", { class: "soft" }, mxd.source.live ? "None yet: run something, then keep it." : "This file holds none."));
  }

  // ---- the view -------------------------------------------------------------------------------------------------------------
  function take({ query }) {
    now.settings = Object.fromEntries(Object.entries(SETTINGS).map(([k, v]) =>
      [k, query.has(k) && Number.isFinite(Number(query.get(k))) ? Number(query.get(k)) : v]));
    now.prompt.value = query.get("p") ?? "Let's talk about";
    now.edits = parse(query.get("e") || query.get("unit"));
    for (const edit of now.edits) edit.value = edit.value ?? first(edit);
    const made = form();
    if (now.form) now.form.replaceWith(made);
    now.form = made;
    drawEdits();
    if (now.guard) now.guard();
    name();
  }
  mxd.view("bench", {
    title: "Bench",
    async mount(el, route, ctx) {
      const section = () => h("section", { class: "stack" });
      now = { el, ctx, max: [], edits: [], lanes: [], labels: new Map(), list: h("div", { class: "stack" }), out: h("div"),
        after: h("div", { class: "stack" }), dosed: h("div"), kept: section(),
        why: h("p", { class: "soft", hidden: true }), status: h("span", { class: "soft" }),
        prompt: h("textarea", { rows: 2, maxlength: 8000 }),
        add: h("input", { type: "number", class: "short", min: 0, max: ctx.student.n_units - 1, step: 1,
          "aria-label": `number of the ${mxd.word(ctx.student)} to edit`, placeholder: "number" }) };
      const mine = now;
      if (ctx.student.store) now.max = (await mxd.source.columns(ctx.student.name, ["max_a"]).catch(() => ({}))).max_a || [];
      if (ctx.signal.aborted) return null;
      if (mxd.source.live) {
        take(route);
        now.guard = mxd.needHost(() => [now.run, now.dose, now.save], now.why, ctx.signal);
      } else now.form = ui.empty("This is an exported file: it holds kept runs, not the model.", `mxd explore ${ctx.run.name}`);
      el.append(h("h1", { class: "sr" }, "Bench"), now.form, now.out, now.after, now.dosed, now.kept);
      kept().catch((error) => !mxd.aborted(error) && mine.kept.replaceChildren(ui.failed(error)));
      return () => {
        if (mine.going) mine.going.abort();
        if (mine.going && mine.job) mxd.source.cancel(mine.job).catch(() => null);
        if (now === mine) now = null;
      };
    },
    update: (route) => mxd.source.live && take(route),
    keys: { Escape: { what: "stop", run: () => Boolean(now) && stop() } },
  });
})();
