// Where the data comes from (a live server, or the block inside an exported file), and the frame that says how things stand.
"use strict";
(() => {
  const { mxd } = window;
  const { h, ui } = mxd;
  const $ = (id) => document.getElementById(id);

  /** What a call failed with, in the server's words: what, expected, got, next; status (0: no answer); body. */
  mxd.ApiError = class extends Error {
    constructor({ what, expected, got, next }, status = 0, body = null) {
      super(what || "something failed");
      Object.assign(this, { name: "ApiError", what: this.message, expected, got, next, status, body });
    }
  };
  const gone = () => new mxd.ApiError({ what: "The server does not answer.", next: `start ${again()} again` });
  const again = () => `mxd explore ${(mxd.state.run && mxd.state.run.path) || "RUN"}`;

  async function call(method, path, { body, signal, headers, raw } = {}) {
    const init = { method, signal, headers: { ...headers }, credentials: "same-origin", cache: "no-cache" };
    if (method !== "GET") init.headers["Content-Type"] = "application/json";
    if (body !== undefined) init.body = JSON.stringify(body);
    let answer;
    try {
      answer = await fetch(path, init);
    } catch (error) {
      if (mxd.aborted(error)) throw error;
      look.now();
      throw gone();
    }
    if (!answer.ok) {
      const told = await answer.json().catch(() => null);
      const fault = (told && told.error) || { what: `The server answered ${answer.status} to ${method} ${path.split("?")[0]}.` };
      throw new mxd.ApiError(fault, answer.status, told);
    }
    return raw ? answer : answer.json();
  }
  const of = (student, rest) => `/api/s/${encodeURIComponent(student)}/${rest}`;
  const asked = (values) => new URLSearchParams(Object.entries(values).filter(([, v]) => v !== undefined && v !== null)).toString();

  // ---- columns: asked once per student and name
  const caches = new Map();
  function unpackColumns(buffer) {
    const length = new DataView(buffer).getUint32(0, true);
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
    const from = Math.ceil((4 + length) / 8) * 8;
    const found = { n: header.n, header, units: null };
    header.names.forEach((name, i) => (found[name] = new Float32Array(buffer, from + 4 * header.n * i, header.n)));
    return found;
  }
  async function columns(fetchColumns, student, names) {
    if (!caches.has(student)) caches.set(student, new Map());
    const cache = caches.get(student);
    const missing = names.filter((name) => !cache.has(name));
    if (missing.length) {
      const coming = fetchColumns(student, missing);
      for (const name of missing) cache.set(name, coming);
      coming.catch(() => missing.forEach((name) => cache.get(name) === coming && cache.delete(name)));
    }
    const parts = await Promise.all(names.map((name) => cache.get(name)));
    const found = { n: 0, header: {}, units: null };
    parts.forEach((part, i) => Object.assign(found, { n: part.n, header: part.header, units: part.units, [names[i]]: part[names[i]] }));
    return found;
  }
  /** A note was saved: the star column follows, and whoever listens to "mxd-note" on document hears it. */
  async function noted(student, unit, note) {
    const cache = caches.get(student);
    if (cache && cache.has("star")) (await cache.get("star")).star[unit] = note && note.star ? 1 : 0;
    document.dispatchEvent(new CustomEvent("mxd-note", { detail: { student, unit: Number(unit), note } }));
    return note;
  }

  // ---- server-sent events over POST -----------------------------------------------------------------------------------------
  async function stream(body, onEvent, signal) {
    const answer = await call("POST", "/api/generate", { body, signal, raw: true });
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let held = "";
    let last = null;
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const blocks = (held + value.replace(/\r/g, "")).split("\n\n");
      held = blocks.pop();
      for (const block of blocks) {
        const lines = block.split("\n");
        const text = lines.filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart()).join("\n");
        const name = lines.find((line) => line.startsWith("event:"));
        if (!text) continue;
        last = name ? name.slice(6).trim() : "message";
        onEvent(last, JSON.parse(text));
      }
    }
    if (last !== "done" && last !== "error") throw new mxd.ApiError({ what: "The stream ended early.", next: "run it again" });
  }

  const nothing = { host: { state: "absent", name: null, progress: null, why: null }, queue: 0, job: null, collect: { state: "none" } };

  // ---- live
  const post = (path, more) => (body, opts) => call("POST", path, { body, ...opts, ...more });
  const live = {
    status: (opts) => call("GET", "/api/status", opts),
    run: (opts) => call("GET", "/api/run", opts),
    columns: (student, names) => columns(fetchColumns, student, names),
    rows: (student, units, opts) => call("GET", of(student, `rows?units=${units.join(",")}`), opts),
    search: (student, q, where, opts) => call("GET", of(student, `search?${asked({ q, in: where && [where].flat().join(",") })}`), opts),
    unit: (student, u, { band, from, n, signal } = {}) => call("GET", of(student, `units/${u}?${asked({ band, from, n })}`), { signal }),
    matches: (student, opts) => call("GET", of(student, "matches"), opts),
    sentence: post("/api/sentence"),
    heat: post("/api/heat"),
    dose: post("/api/dose"),
    ablate: post("/api/ablate"),
    edit: post("/api/edit"),
    stream,
    cancel: (job, opts) => call("DELETE", `/api/jobs/${encodeURIComponent(job)}`, opts),
    notes: (opts) => call("GET", "/api/notes", opts),
    note: (student, u, opts) => call("GET", of(student, `notes/${u}`), opts),
    async saveNote(student, u, { star, text, tags, updated }, opts) {
      const headers = updated ? { "If-Match": `"${updated}"` } : {};
      return noted(student, u, await call("PUT", of(student, `notes/${u}`), { body: { star, text, tags }, headers, ...opts }));
    },
    benches: (opts) => call("GET", "/api/bench", opts),
    saveBench: post("/api/bench"),
    deleteBench: (id, opts) => call("DELETE", `/api/bench/${encodeURIComponent(id)}`, opts),
    exportSize: post("/api/export/size"),
    exportFile: async (body, opts) => (await call("POST", "/api/export", { body, raw: true, ...opts })).blob(),
    sentences: (opts) => call("GET", "/api/sentences", opts),
    saveSentence: post("/api/sentences"),
    deleteSentence: (id, opts) => call("DELETE", `/api/sentences/${encodeURIComponent(id)}`, opts),
  };
  async function fetchColumns(student, names) {
    return unpackColumns(await (await call("GET", of(student, `columns?names=${names.join(",")}`), { raw: true })).arrayBuffer());
  }

  // ---- an exported file
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  let opened = null;
  const data = () => (opened = opened || unpackFile());
  async function unpackFile() {
    const packed = new Blob([bytes($("mxd-data").textContent.trim())]).stream().pipeThrough(new DecompressionStream("gzip"));
    const found = await new Response(packed).json();
    if (found.format === 1) return mxd.unpacked ? mxd.unpacked(found) : found;
    throw new mxd.ApiError({ what: "This file is of another version.", expected: "format 1", got: `format ${found.format}` });
  }
  const onlyLive = async () => {
    throw new mxd.ApiError({ what: "This is an exported file: it holds results, not the model.", next: again() });
  };
  async function part(student) {
    const found = (await data()).students[student];
    return found || Promise.reject(new mxd.ApiError({ what: `This file holds no units of ${student}.`, next: again() }));
  }
  async function fileColumns(student, names) {
    const { columns: kept } = await part(student);
    const record = mxd.state.run.students.find((s) => s.name === student);
    const values = new Float32Array(bytes(kept.data).buffer);
    const found = { n: record.n_units, header: { names: kept.names, n: record.n_units }, units: Int32Array.from(kept.units) };
    for (const name of names) {
      const column = (found[name] = new Float32Array(record.n_units).fill(NaN));
      const at = kept.names.indexOf(name) * kept.n;
      if (at >= 0) kept.units.forEach((unit, i) => (column[unit] = values[at + i]));
    }
    return found;
  }
  function answers(row, unit, q) {
    const has = (text) => Boolean(text) && text.toLowerCase().includes(q);
    const labels = (unit && unit.labels) || (row.label ? [row.label] : []);
    const note = row.note || (unit && unit.note);
    return {
      label: labels.some((l) => has(l.text)),
      note: Boolean(note) && (has(note.text) || (note.tags || []).some(has)),
      token: Boolean(unit) && unit.peak_tokens.some((t) => t.token.trim().toLowerCase() === q),
    };
  }
  const file = {
    ...Object.fromEntries(Object.keys(live).map((name) => [name, onlyLive])),
    status: async () => ({ ...nothing, gone: false }),
    run: async () => (await data()).run,
    columns: (student, names) => columns(fileColumns, student, names),
    rows: async (student, units) => {
      const { rows } = await part(student);
      return { units: units.filter((u) => rows[u]).map((u) => rows[u]) };
    },
    async search(student, q, where) {
      const { rows, units } = await part(student);
      const by = { label: [], note: [], token: [], text: [] };
      for (const u of Object.keys(rows)) {
        const found = answers(rows[u], units[u], q.trim().toLowerCase());
        for (const name of ["label", "note", "token"]) if (found[name] && (!where || where.includes(name))) by[name].push(Number(u));
      }
      return { units: [...new Set([...by.label, ...by.note, ...by.token])], by, host_needed: !where || where.includes("text") };
    },
    async unit(student, u, { band, from = 0, n = 100 } = {}) {
      const found = (await part(student)).units[u];
      if (!found) throw new mxd.ApiError({ what: `Unit ${u} is not in this file.`, next: again() });
      if (band === undefined) return found;
      const cut = (b) => ({ ...b, contexts: b.contexts.slice(from, from + n) });
      return { ...found, bands: found.bands.filter((b) => b.band === Number(band)).map(cut) };
    },
    matches: async (student) => (await part(student)).matches,
    async sentence(body) {
      const same = ({ request: r }) => (body.text === undefined ? r.seq === body.seq : r.text === body.text);
      const found = ((await data()).sentences || []).find(same);
      if (!found) return onlyLive();
      const read = body.students.map((name) => found.answer.students.find((one) => one.name === name)).filter(Boolean);
      if (read.length) return { ...found.answer, students: read };
      throw new mxd.ApiError({ what: `${body.students.join(", ")} did not read this sentence before it was kept.`,
        expected: found.students.join(", "), next: again() });
    },
    notes: async () => ({ notes: (await data()).notes || [] }),
    note: async (student, u) => ((await data()).notes || []).find((note) => note.student === student && note.unit === Number(u)) || null,
    benches: async () => ({ runs: (await data()).bench || [] }),
    sentences: async () => ({ sentences: (await data()).sentences || [] }),
  };

  /** One interface to both: mxd.source.live says which. Calls take {signal} last and reject with mxd.ApiError or AbortError. */
  mxd.source = {
    get live() {
      return !$("mxd-data");
    },
  };
  for (const name of Object.keys(live)) mxd.source[name] = (...args) => (mxd.source.live ? live : file)[name](...args);

  // ---- how the page stands with the server
  const listeners = new Set();
  let timer = null;
  let failures = 0;
  let polling = false;
  /** fn(status) now and at each change, until signal aborts. status is /api/status with `gone`: true while nobody answers. */
  mxd.onStatus = (fn, signal) => {
    listeners.add(fn);
    if (signal) signal.addEventListener("abort", () => listeners.delete(fn));
    if (mxd.state.status) fn(mxd.state.status);
  };
  /** Why the host can't be asked now, in words; null if it can. */
  mxd.blocked = () => {
    const { status } = mxd.state;
    if (!mxd.source.live) return "This is an exported file: it holds results, not the model.";
    if (!status || status.gone) return "The server does not answer.";
    const { state, progress, why } = status.host;
    if (state === "ready") return null;
    if (state === "loading") return `The host is loading${progress === null ? "" : ` (${Math.round(100 * progress)} %)`}.`;
    return (why && [why.what, why.next && `next: ${why.next}`].filter(Boolean).join(" · ")) || "No host is loaded: reading only.";
  };
  async function poll() {
    if (polling || !mxd.source.live) return;
    polling = true;
    clearTimeout(timer);
    let status = null;
    let fault = null;
    try {
      status = { ...(await call("GET", "/api/status")), gone: false };
      failures = 0;
    } catch (error) {
      fault = error;
      status = { ...(mxd.state.status || nothing), gone: true };
      failures += 1;
    }
    polling = false;
    const busy = status.host.state === "loading" || status.collect.state === "running";
    const wait = failures ? Math.min(30, 2 ** (failures - 1)) : busy ? 1 : document.hidden ? 30 : 5;
    timer = setTimeout(poll, 1000 * wait);
    take(status, fault, wait);
  }
  const look = { now: () => !polling && !failures && poll() };
  function take(status, fault, wait) {
    const before = mxd.state.status;
    mxd.state.status = status;
    document.body.toggleAttribute("data-veil", Boolean(status.veil));
    document.body.toggleAttribute("data-gone", status.gone);
    bar(fault, wait);
    pill(status);
    if (before && before.host.state !== status.host.state) ui.announce(`host: ${words(status)}`);
    for (const fn of listeners) fn(status);
    const collected = before && before.collect.state === "running" && status.collect.state === "done";
    if (collected || (before && before.gone && !status.gone)) refresh(collected);
  }
  async function refresh(clear) {
    try {
      const run = await mxd.source.run();
      if (clear) caches.clear();
      if (clear || JSON.stringify(run) !== JSON.stringify(mxd.state.run)) mxd.open(run);
    } catch {
      // the next poll says what is wrong
    }
  }
  function bar(fault, wait) {
    const el = $("gone");
    const was = !el.hidden;
    el.hidden = !fault || !mxd.state.run; // with nothing loaded the view itself says what is wrong
    if (!fault) return void (was && (el.replaceChildren(), ui.announce("the server answers again")));
    const shut = fault.status === 403;
    const what = shut ? fault.what : "The server has stopped answering; all that is loaded stays readable.";
    el.replaceChildren(
      h("strong", null, what),
      h("span", null, ` next: ${fault.next || `start ${again()} again`} · trying again ${wait > 1 ? `in ${wait} s` : "now"} `),
      ui.button("Try now", () => ((failures = 0), poll())),
    );
  }
  function words({ host, gone: lost, queue, collect }) {
    if (lost) return "no server";
    const percent = host.progress === null || host.progress === undefined ? "" : ` ${Math.round(100 * host.progress)} %`;
    const said = { loading: `loading${percent}`, ready: "ready", absent: "reading only", failed: "failed" }[host.state];
    const far = collect.total ? ` ${Math.floor((100 * collect.done) / collect.total)} %` : "";
    const share = collect.state === "running" ? ` · collecting${far}` : "";
    return `${said}${queue ? ` · ${queue} waiting` : ""}${share}`;
  }
  function pill(status) {
    const state = status.gone ? "gone" : status.host.state;
    $("pill").dataset.state = state;
    const said = state === "absent" || state === "gone" ? words(status) : `host: ${words(status)}`;
    const text = mxd.source.live ? said : "file: reading only";
    if ($("pill").textContent !== text) $("pill").textContent = text;
  }
  function explain() {
    const { status, run } = mxd.state;
    const { host, collect } = status;
    const why = (w) => w && [w.what, w.expected && `expected ${w.expected}`, w.got && `got ${w.got}`, w.next && `next: ${w.next}`];
    const left = collect.seconds_left ? `, ${Math.ceil(collect.seconds_left / 60)} min left` : "";
    const done = `${mxd.fmt.big(collect.done)} of ${mxd.fmt.big(collect.total)} tokens (${collect.stage})${left}`;
    const lines = [
      ["host", [host.name || (run && run.host), words({ ...status, queue: 0, collect: {} })].filter(Boolean).join(": ")],
      ["why", why(host.why) && why(host.why).filter(Boolean).join(" · ")],
      ["waiting", status.queue ? `${status.queue} in the queue` : null],
      ["collected", collect.state === "running" ? done : collect.state],
      ["", collect.why && (why(collect.why) || []).filter(Boolean).join(" · ")],
      ["mxd", status.version],
    ].filter(([, text]) => text);
    ui.dialog("Host and server", h("dl", { class: "facts" }, lines.map(([name, text]) => [h("dt", null, name), h("dd", null, text)])));
  }

  // ---- the frame
  const about = (s) => [s.name, s.k && `K ${s.k}`, s.hookpoint, s.store ? null : "no store"].filter(Boolean).join(" · ");
  function find(event) {
    event.preventDefault();
    const asked = $("find-text").value.trim();
    const { student } = mxd.state;
    if (!asked || !student) return;
    if (/^\d+$/.test(asked) && Number(asked) < student.n_units) mxd.go({ view: "unit", id: String(Number(asked)) });
    else mxd.go({ view: "units", query: { q: asked } });
  }
  function pick() {
    const { view, query } = mxd.route();
    mxd.go(view === "unit" ? { student: $("picker").value, view: "units" } : { student: $("picker").value, view, query });
  }
  function theme(next) {
    const names = ["auto", "light", "dark"];
    const name = next ? names[(names.indexOf(mxd.kept("theme") || "auto") + 1) % 3] : mxd.kept("theme") || "auto";
    if (next) mxd.kept("theme", name);
    if (name === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = name;
    $("theme").textContent = { auto: "◐", light: "☀", dark: "☾" }[name];
    $("theme").setAttribute("aria-label", `Colours: ${name}`);
    document.dispatchEvent(new Event("mxd-theme"));
  }
  /** Fill the frame from the run's record and draw the view. */
  mxd.open = (run) => {
    mxd.state.run = run;
    $("run-name").textContent = run.name;
    $("picker").replaceChildren(...run.students.map((s) => h("option", { value: s.name }, about(s))));
    $("picker").disabled = run.students.length < 2;
    document.dispatchEvent(new Event("mxd-run"));
    mxd.redraw();
  };
  async function begin() {
    const main = $("main");
    main.replaceChildren(ui.loading(240));
    try {
      if (!mxd.source.live) mxd.state.status = await mxd.source.status();
      mxd.open(await mxd.source.run());
    } catch (error) {
      main.replaceChildren(ui.failed(error, begin));
    }
  }
  function ready() {
    history.scrollRestoration = "manual";
    theme(false);
    $("theme").addEventListener("click", () => theme(true));
    $("help").addEventListener("click", mxd.keys.help);
    $("pill").addEventListener("click", explain);
    $("picker").addEventListener("change", pick);
    $("find").addEventListener("submit", find);
    document.querySelector(".skip").addEventListener("click", (event) => (event.preventDefault(), $("main").focus()));
    begin().then(() => mxd.source.live || pill(mxd.state.status));
    poll();
  }
  if (document.readyState === "complete") ready();
  else document.addEventListener("DOMContentLoaded", ready);
})();
