// The Notes view: what the user starred or wrote down, out to files and in again; and what happens when two tabs write one note.
"use strict";
(() => {
  const { mxd } = window;
  const { h, ui, fmt } = mxd;
  const FIELDS = ["student", "unit", "star", "text", "tags", "updated", "weights_sha"];
  const RISKY = /^[=+\-@\t\r]/;

  // ---- files
  /** One CSV cell; what a spreadsheet would take for a formula starts with ' instead. */
  function cell(value) {
    const text = Array.isArray(value) ? value.join("; ") : typeof value === "boolean" ? String(Number(value)) : String(value ?? "");
    const safe = RISKY.test(text) ? `'${text}` : text;
    return /[",\n\r]/.test(safe) ? `"${safe.replace(/"/g, '""')}"` : safe;
  }
  /** Rows (objects) as CSV text with a line of names. */
  const toCsv = (names, rows) => [names.join(","), ...rows.map((row) => names.map((name) => cell(row[name])).join(","))].join("\r\n");
  function fromCsv(text) {
    const rows = [[""]];
    let quoted = false;
    for (let i = 0; i < text.length; i++) {
      const c = text[i];
      const row = rows[rows.length - 1];
      if (c === '"' && quoted && text[i + 1] === '"') row[row.length - 1] += text[i++];
      else if (c === '"' && (quoted || row[row.length - 1] === "")) quoted = !quoted;
      else if (c === "," && !quoted) row.push("");
      else if (c === "\n" && !quoted) rows.push([""]);
      else if (c !== "\r" || quoted) row[row.length - 1] += c;
    }
    const [names, ...rest] = rows.filter((row) => row.length > 1);
    const plain = (value) => (/^'[=+\-@\t\r]/.test(value) ? value.slice(1) : value);
    return rest.map((row) => Object.fromEntries((names || []).map((name, i) => [name.trim(), plain(row[i] ?? "")])));
  }
  /** A note from a file in the form of ours; throws with words where it isn't one. */
  function tidy(found) {
    const unit = Number(found.unit);
    const student = mxd.state.run.students.find((s) => s.name === found.student);
    if (!student) throw new Error(`unknown student "${found.student}"`);
    const known = String(found.unit).trim() !== "" && Number.isInteger(unit) && unit >= 0 && unit < student.n_units;
    if (!known) throw new Error(`${student.name} has no unit ${found.unit}`);
    const tags = Array.isArray(found.tags) ? found.tags : String(found.tags || "").split(";");
    const star = found.star === true || ["1", "true"].includes(String(found.star));
    const other = found.weights_sha && student.weights_sha256 && found.weights_sha !== student.weights_sha256;
    return { student: student.name, unit, star, text: String(found.text || ""), tags: tags.map((t) => t.trim()).filter(Boolean), other };
  }
  const same = (a, b) => a.star === b.star && a.text === b.text && a.tags.join("\n") === b.tags.join("\n");

  // ---- two versions of one note
  const version = (title, note) =>
    h("div", { class: "panel" }, h("h3", null, title), h("p", null, starred(note), mxd.heat.text(note.text || "–")), tagList(note.tags));
  const starred = (note) => (note.star ? h("span", { role: "img", "aria-label": "starred" }, "★ ") : null);
  const tagList = (tags) => h("p", { class: "chips" }, (tags || []).map((tag) => h("span", { class: "tag" }, mxd.heat.text(tag))));
  /** Ask which of two versions to keep. Resolves to a note {star, text, tags}, or null if the dialog was closed. */
  mxd.conflict = (mine, theirs, title = "This note was changed elsewhere") =>
    new Promise((resolve) => {
      const take = (note) => () => (resolve(note), dialog.close());
      const tags = [...new Set([...(theirs.tags || []), ...mine.tags])];
      const both = { star: mine.star || theirs.star, text: [theirs.text, mine.text].filter(Boolean).join("\n"), tags };
      const buttons = [ui.button("Keep mine", take(mine)), ui.button("Keep the other", take(theirs)), ui.button("Join both", take(both))];
      const panels = h("div", { class: "cols" }, version("Mine", mine), version("The other", theirs));
      const dialog = ui.dialog(title, [panels, h("p", { class: "line" }, buttons)]);
      dialog.el.addEventListener("close", () => resolve(null));
    });
  /** Save a note; a conflict is shown with both texts and asked about. Resolves to the note as saved, or null. */
  mxd.saveNote = async (student, unit, note) => {
    try {
      return await mxd.source.saveNote(student, unit, note);
    } catch (error) {
      if (error.status !== 409 || !error.body || !error.body.current) throw error;
      const theirs = { star: false, text: "", tags: [], ...error.body.current };
      const chosen = await mxd.conflict(note, theirs);
      return chosen && mxd.saveNote(student, unit, { ...chosen, updated: theirs.updated });
    }
  };

  // ---- the view
  function edit(note, done) {
    const text = h("textarea", { rows: 6, maxlength: 20000, "aria-label": "note" }, note.text);
    const tags = h("input", { value: note.tags.join("; "), "aria-label": "tags, separated by ;" });
    const star = h("input", { type: "checkbox", checked: note.star });
    const fault = h("div");
    const save = async () => {
      const list = tags.value.split(";").map((t) => t.trim()).filter(Boolean);
      try {
        await mxd.saveNote(note.student, note.unit, { ...note, star: star.checked, text: text.value, tags: list });
        dialog.close();
        done();
      } catch (error) {
        fault.replaceChildren(ui.failed(error, save));
      }
    };
    const body = [
      h("label", { class: "check" }, star, "starred"),
      text,
      h("label", { class: "field" }, h("span", null, "tags, separated by ;"), tags),
      fault,
      h("button", { type: "button", class: "primary", on: { click: save } }, "Save"),
    ];
    const dialog = ui.dialog(`${note.student} · ${note.unit}`, body);
    text.focus();
  }
  async function labels(notes, signal) {
    const found = new Map();
    const asks = [];
    for (const { name, store } of mxd.state.run.students) {
      const units = notes.filter((note) => note.student === name && !note.stale).map((note) => note.unit);
      for (let i = 0; store && i < units.length; i += 200) asks.push([name, units.slice(i, i + 200)]);
    }
    for (const [name, units] of asks) {
      const answer = await mxd.source.rows(name, units, { signal }).catch(() => ({ units: [] }));
      if (signal.aborted) break;
      for (const row of answer.units) if (row.label) found.set(`${name}/${row.unit}`, row.label);
    }
    return found;
  }
  function line(note, label, again) {
    const old = note.stale && h("span", { class: "tag warn" }, "other weights");
    if (old) ui.tip(old, "Written for weights with another hash: the unit of this number may be a different one now.");
    const move = () => mxd.saveNote(note.student, note.unit, { star: note.star, text: note.text, tags: note.tags }).then(again, again);
    const link = h("a", { href: mxd.href({ student: note.student, view: "unit", id: note.unit }) }, String(note.unit));
    const act = note.stale ? ui.button("Copy to these weights", move) : ui.button("Edit", () => edit(note, again));
    act.setAttribute("aria-label", `${act.textContent}: ${note.student} ${note.unit}`);
    return h(
      "tr",
      null,
      h("td", null, starred(note)),
      h("td", null, note.student),
      h("th", { scope: "row", class: "num" }, link, old),
      h("td", null, label ? mxd.heat.text(label.text) : fmt.dash("no label")),
      h("td", null, mxd.heat.text(note.text)),
      h("td", null, tagList(note.tags)),
      h("td", { title: note.updated }, fmt.ago(note.updated)),
      h("td", { class: "no-print" }, mxd.source.live ? act : null),
    );
  }
  async function take(file, notes, again) {
    const text = await file.text();
    const report = { saved: 0, same: 0, left: 0, refused: [] };
    let found = [];
    try {
      const read = /^\s*[[{]/.test(text) ? JSON.parse(text) : fromCsv(text);
      found = Array.isArray(read) ? read : read.notes;
      if (!Array.isArray(found)) throw new Error("no list of notes in it");
    } catch (error) {
      return void ui.dialog("Nothing was read in", ui.failed(new Error(`${file.name}: ${error.message}`)));
    }
    const others = found.filter((one) => {
      try {
        return tidy(one).other;
      } catch {
        return false;
      }
    }).length;
    const message = `${others} of ${found.length} notes were written for other weights: the same number may be another unit here.`;
    if (others && !(await confirm(message))) return;
    for (const one of found) {
      try {
        const note = tidy(one);
        const present = notes.find((n) => n.student === note.student && n.unit === note.unit && !n.stale);
        const title = `${note.student} · ${note.unit}: the file and this run differ`;
        const chosen = !present ? note : same(note, present) ? present : await mxd.conflict(note, present, title);
        if (chosen === present) report.same += 1;
        else if (!chosen) report.left += 1;
        else if (await mxd.saveNote(note.student, note.unit, { ...chosen, updated: present && present.updated })) report.saved += 1;
      } catch (error) {
        report.refused.push(error.message);
      }
    }
    again();
    const said = `${report.saved} saved, ${report.same} kept as they were, ${report.left} left out, ${report.refused.length} refused.`;
    const whys = report.refused.slice(0, 20).map((why) => h("li", null, mxd.heat.text(why)));
    ui.dialog(`Read in ${file.name}`, [h("p", null, said), h("ul", null, whys)]);
  }
  const confirm = (message) =>
    new Promise((resolve) => {
      const go = ui.button("Read them in", () => (resolve(true), dialog.close()), { class: "primary" });
      const dialog = ui.dialog("Other weights", [h("p", null, message), go]);
      dialog.el.addEventListener("close", () => resolve(false));
    });

  function mount(el, route, ctx) {
    let notes = [];
    let names = new Map();
    const about = { placeholder: "student, label, note, tag", "aria-label": "filter notes" };
    const filter = h("input", { type: "search", "data-search": "", maxlength: 200, ...about });
    filter.value = route.query.get("q") || "";
    const stars = h("input", { type: "checkbox", checked: route.query.get("star") === "1" });
    const count = h("span", { class: "soft", role: "status" });
    const place = h("div", { class: "stack" }, ui.loading(200));
    const file = h("input", { type: "file", accept: ".json,.csv", hidden: true });
    const label = (note) => names.get(`${note.student}/${note.unit}`);
    const matching = () => {
      const q = filter.value.trim().toLowerCase();
      const said = (note) => [note.student, note.unit, note.text, ...note.tags, label(note) ? label(note).text : ""];
      const words = (note) => said(note).join("\n").toLowerCase();
      return notes.filter((note) => (!stars.checked || note.star) && words(note).includes(q));
    };
    const heads = ["★", "student", "unit", "label", "note", "tags", "changed", ""];
    const named = (name) => (name ? h("th", { scope: "col", class: name === "unit" && "num" }, name) : h("td"));
    const head = () => h("thead", null, h("tr", null, heads.map(named)));
    const draw = () => {
      const shown = matching();
      count.textContent = notes.length ? `${shown.length} of ${notes.length}` : "";
      const stale = notes.filter((note) => note.stale).length;
      const warning = stale > 0 && ui.note(`Written for other weights than those in this run: ${stale} of ${notes.length} notes.`, "warn");
      const table = h("table", { class: "plain" }, head(), h("tbody", null, shown.map((note) => line(note, label(note), load))));
      const none = notes.length ? "No note matches the filter." : "No note yet: press f on a unit to star it, n to write something down.";
      place.replaceChildren(...[warning, shown.length ? h("div", { class: "scroll panel" }, table) : ui.empty(none)].filter(Boolean));
    };
    const load = async () => {
      try {
        notes = (await mxd.source.notes({ signal: ctx.signal })).notes;
        draw();
        names = await labels(notes, ctx.signal);
        draw();
      } catch (error) {
        if (!mxd.aborted(error)) place.replaceChildren(ui.failed(error, load));
      }
    };
    const out = (kind) => {
      const rows = matching().map((note) => Object.fromEntries(FIELDS.map((name) => [name, note[name]])));
      if (kind === "csv") ui.save(`\ufeff${toCsv(FIELDS, rows)}`, `${ctx.run.name}-notes.csv`, "text/csv");
      else ui.save(JSON.stringify({ notes: rows }, null, 1), `${ctx.run.name}-notes.json`);
    };
    const changed = mxd.debounce(() => (draw(), mxd.setQuery({ q: filter.value, star: stars.checked ? "1" : null })), 150);
    filter.addEventListener("input", changed);
    stars.addEventListener("change", changed);
    file.addEventListener("change", () => file.files[0] && take(file.files[0], notes, load).then(() => (file.value = "")));
    const buttons = [ui.button("JSON", () => out("json")), ui.button("CSV", () => out("csv"))];
    if (mxd.source.live) buttons.push(ui.button("Read in…", () => file.click(), { "data-live": "" }), file);
    el.append(
      h("div", { class: "head" }, h("h1", null, "Notes"), buttons),
      h("div", { class: "controls" }, filter, h("label", { class: "check" }, stars, "starred only"), count),
      place,
    );
    document.addEventListener("mxd-note", load, { signal: ctx.signal });
    load();
  }
  mxd.view("notes", { title: "Notes", mount });
  mxd.csv = { write: toCsv, read: fromCsv };
})();
