// Which units, in which order: mxd.select, one list for table, map, histograms, previous/next and export; and the grid that shows rows.
"use strict";
(() => {
  const { h, fmt } = mxd;
  const STATES = ["dead", "rare", "live", "shared"];

  // ---- what is known of every unit ------------------------------------------------------------------------------------------
  const field = (key, name, unit, kind, title, format = (v) => fmt.num(v), column = key) =>
    ({ key, name, unit, kind, title, format, column });
  const rate = (v, T) => fmt.rate(v * T, T);
  const nats = (v) => fmt.nats(v);
  /** The numeric facts of a unit: {key (in addresses), name, unit, kind (of scale), title (definition), format(v, tokens), column}. */
  mxd.fields = [
    field("freq", "fires", "share of tokens", "log", "Share of the collected tokens on which the unit is active.", rate, "fires"),
    field("effect", "effect", "nats", "symlog", "Nats the following tokens lose without it, per firing; first-order estimate.", nats),
    field("max_a", "max a", "activation", "log", "The unit's largest activation in the collected text."),
    field("score", "score", "balanced accuracy", "linear", "Detection: how well its label tells its contexts from others; .5 is chance."),
    field("share", "share", "of the output", "linear", "Norm of its contribution over the norm of the layer's output, mean over firings."),
    field("steadiness", "steadiness", "0 to 1", "linear", "Length of its mean unit contribution: 1 a fixed direction, 0 none."),
    field("top_token_share", "top token", "% of firings", "linear", "Share of its firings on its commonest token.", (v) => fmt.pct(v)),
    field("token_entropy", "token entropy", "bits", "linear", "Entropy of the tokens it fires on: 0 one token, 1 two equally often."),
    field("partner_lift", "partner lift", "×", "log", "How much more often than by chance it fires with its strongest partner."),
    field("probe_f1", "probe F1", "F1", "linear", "Best probe on this unit alone, on held-out text."),
  ];
  const COLUMNS = ["state", "fires", "effect_se", "score_n", "partner", ...mxd.fields.map((f) => f.column), "star", "labelled"];
  const tables = new Map();

  /**
   * The columns of a student with a store: {n, tokens, units (those present), get(key) -> Float32Array of all units, NaN unknown}.
   * @param {object|string} student record or name @returns {Promise<object>}
   */
  mxd.columns = (student) => {
    const name = student.name || student;
    const { store, why } = mxd.state.run.students.find((s) => s.name === name);
    if (!store) return Promise.reject(new mxd.ApiError(why || { what: `${name} has no units to list.` }));
    const key = `${name} ${store.created} ${store.tokens}`;
    if (!tables.has(key)) {
      const coming = mxd.source.columns(name, [...new Set(COLUMNS)]).then((found) => {
        const n = found.fires.length;
        const freq = found.fires.map((v) => v / store.tokens);
        const units = found.units ? Uint32Array.from(found.units) : Uint32Array.from({ length: n }, (_, i) => i);
        return { key, n, tokens: store.tokens, units, freq, get: (k) => (k === "freq" ? freq : found[k]) };
      });
      tables.set(key, coming);
      coming.catch(() => tables.delete(key));
    }
    return tables.get(key);
  };

  // ---- order: least-significant-digit radix sort, stable, unknown last whichever way --------------------------------------
  function keysOf(values, units, down) {
    const bits = new Uint32Array(values.buffer, values.byteOffset, values.length), keys = new Uint32Array(units.length);
    for (let i = 0; i < units.length; i++) {
      const b = bits[units[i]], up = b & 0x80000000 ? ~b : b | 0x80000000;
      keys[i] = (b & 0x7fffffff) > 0x7f800000 ? 0xffffffff : down ? ~up : up;
    }
    return keys;
  }
  function shuffled(seed, units) {
    return units.map((u) => {
      let x = Math.imul(u + 1, 0x9e3779b1) ^ Math.imul(seed + 1, 0x85ebca6b);
      x = Math.imul(x ^ (x >>> 16), 0x21f0aaad);
      x = Math.imul(x ^ (x >>> 15), 0x735a2d97);
      return x ^ (x >>> 15);
    });
  }
  function radix(units, keys) {
    const n = units.length;
    let order = Uint32Array.from({ length: n }, (_, i) => i), other = new Uint32Array(n);
    for (const shift of [0, 11, 22]) {
      const count = new Uint32Array(2049);
      for (let i = 0; i < n; i++) count[((keys[i] >>> shift) & 2047) + 1]++;
      for (let b = 0; b < 2048; b++) count[b + 1] += count[b];
      for (let i = 0; i < n; i++) other[count[(keys[order[i]] >>> shift) & 2047]++] = order[i];
      [order, other] = [other, order];
    }
    for (let i = 0; i < n; i++) other[i] = units[order[i]];
    return other;
  }
  /** "-effect,freq" -> [["effect", true], ["freq", false]] */
  const parseSort = (text) => (text || "").split(",").filter(Boolean).map((s) => (s[0] === "-" ? [s.slice(1), true] : [s, false]));
  function sorted(data, units, sort) {
    for (const [key, down] of [...sort].reverse()) {
      const seed = /^shuffle:(\d+)$/.exec(key), values = key === "unit" || seed ? null : data.get(key);
      if (seed) units = radix(units, shuffled(Number(seed[1]), units));
      else if (key === "unit") units = radix(units, down ? units.map((u) => ~u) : units);
      else if (values) units = radix(units, keysOf(values, units, down));
    }
    return units;
  }

  // ---- filters --------------------------------------------------------------------------------------------------------------
  const KEYS = ["q", "in", "sort", "state", "star", "labelled", "probe", ...mxd.fields.map((f) => f.key)];
  const searches = new Map(), lists = new Map();
  let version = 0;
  document.addEventListener("mxd-note", () => version++);
  const ends = (text) => text.split("..").map((t, i) => (t === "" || Number.isNaN(Number(t)) ? [-Infinity, Infinity][i] : Number(t)));
  const spell = (v, f, tokens) => (f.key === "freq" ? fmt.rate(v * tokens, tokens) : fmt.num(v, 3));
  function said(f, [low, high], tokens) {
    const [a, b] = [low, high].map((v) => spell(v, f, tokens));
    return low === -Infinity ? `${f.name} ≤ ${b}` : high === Infinity ? `${f.name} ≥ ${a}` : `${f.name} ${a} … ${b}`;
  }
  function asked(student, query) {
    const q = query.get("q").trim().slice(0, 200), where = query.get("in") || "label,note,token";
    const key = `${version} ${student} ${where} ${q}`;
    if (!searches.has(key)) {
      const coming = mxd.source.search(student, q, where.split(","));
      if (searches.size > 20) searches.clear();
      searches.set(key, coming);
      coming.catch(() => searches.delete(key));
    }
    return searches.get(key);
  }
  async function probed(student, data, task) {
    const f1 = data.get("probe_f1"), units = [...data.units].filter((u) => f1[u] === f1[u]).slice(0, 2000), found = new Map();
    for (let i = 0; i < units.length; i += 200) {
      for (const row of (await mxd.source.rows(student, units.slice(i, i + 200))).units) {
        for (const p of row.probes || []) found.set(`${p.task}:${p.class}`, [...(found.get(`${p.task}:${p.class}`) || []), row.unit]);
      }
    }
    return task ? new Set(found.get(task) || []) : found;
  }
  /** The probe classes that single units of a student know, each with its units: Promise<Map("task:class" -> unit[])>. */
  mxd.probeClasses = async (student) => probed(student.name || student, await mxd.columns(student));

  /** The filters of a query, each {key, text (for its chip), pass(unit) -> boolean}. */
  async function filters(student, data, query, tokens) {
    const found = [];
    const flag = (key, text, column) => {
      const values = data.get(column), want = query.get(key) !== "0";
      found.push({ key, text: want ? text : `not ${text}`, pass: (u) => values[u] > 0 === want });
    };
    for (const f of mxd.fields) {
      if (!query.get(f.key)) continue;
      const values = data.get(f.key), [low, high] = ends(query.get(f.key));
      found.push({ key: f.key, text: said(f, [low, high], tokens), values, low: Math.fround(low), high: Math.fround(high) });
    }
    if (query.get("state")) {
      const wanted = query.get("state").split(","), states = data.get("state"), ok = STATES.map((s) => wanted.includes(s));
      found.push({ key: "state", text: wanted.join(" or "), pass: (u) => ok[states[u]] === true });
    }
    if (query.get("star")) flag("star", "starred", "star");
    if (query.get("labelled")) flag("labelled", "labelled", "labelled");
    if (query.get("probe") === "1") flag("probe", "has a probe", "probe_f1");
    else if (query.get("probe")) {
      const units = await probed(student, data, query.get("probe"));
      found.push({ key: "probe", text: `probe ${query.get("probe")}`, pass: (u) => units.has(u) });
    }
    if ((query.get("q") || "").trim()) {
      const answer = await asked(student, query), units = new Set(answer.units);
      found.push({ key: "q", text: `“${query.get("q").trim()}”`, pass: (u) => units.has(u), answer });
    }
    return found;
  }

  /**
   * The units that a query asks for, in its order. Query keys: q, in, sort ("-effect,freq", "shuffle:SEED"), state, star, labelled,
   * probe ("1" or "task:class"), and the keys of mxd.fields as "low..high"; others are ignored.
   * @param {object|string} student @param {URLSearchParams|object} query @returns {Promise<Uint32Array>}
   */
  mxd.select = async (student, query) => (await mxd.select.explain(student, query)).units;
  /** The same with {units, total, sort, filters: [{key, text, alone, answer?}]}; `alone` counts the units that only this filter removes. */
  mxd.select.explain = async (student, query) => {
    const name = student.name || student, own = mxd.select.query(query), data = await mxd.columns(name), { units } = data;
    const key = `${version} ${data.key} ${own}`;
    if (lists.has(key)) return lists.get(key);
    const used = await filters(name, data, own, data.tokens);
    const mask = new Uint32Array(units.length), kept = new Uint32Array(units.length);
    used.forEach(({ pass, values, low, high }, bit) => {
      const fails = 1 << bit;
      if (pass) for (let i = 0; i < units.length; i++) mask[i] |= pass(units[i]) ? 0 : fails;
      else for (let i = 0; i < units.length; i++) mask[i] |= values[units[i]] >= low && values[units[i]] <= high ? 0 : fails;
    });
    let n = 0;
    const alone = new Map();
    for (let i = 0; i < units.length; i++) {
      if (mask[i] === 0) kept[n++] = units[i];
      else if ((mask[i] & (mask[i] - 1)) === 0) alone.set(mask[i], (alone.get(mask[i]) || 0) + 1);
    }
    used.forEach((f, bit) => { f.alone = alone.get(1 << bit) || 0; });
    // What fires on a text comes ranked; all else has its effect first, unless the query says otherwise.
    const ranked = own.get("in") === "text" && used.find((f) => f.answer), sort = parseSort(own.get("sort") || (ranked ? "" : "-effect"));
    const among = ranked && new Set(kept.subarray(0, n));
    const as = ranked && !sort.length && ranked.answer.units.filter((u) => among.has(u));
    const list = as ? Uint32Array.from(as) : sorted(data, kept.slice(0, n), sort);
    const result = { units: list, total: units.length, filters: used, sort };
    if (lists.size > 8) lists.delete(lists.keys().next().value);
    lists.set(key, result);
    return result;
  };
  /** Only what mxd.select reads of a query, in one order: what a link to a unit carries so that [ and ] walk the same list. */
  mxd.select.query = (query) => {
    const given = query instanceof URLSearchParams ? [...query] : Object.entries(query || {});
    const all = new URLSearchParams(given.filter(([, v]) => v !== null && v !== undefined));
    return new URLSearchParams(KEYS.filter((k) => all.get(k)).map((k) => [k, all.get(k)]));
  };
  Object.assign(mxd.select, { parseSort, STATES, ends, shuffled });

  // ---- the grid -------------------------------------------------------------------------------------------------------------
  const LIMIT = 14e6;
  let grids = 0;
  /**
   * A grid of any number of equally high rows, drawn by some 32 recycled nodes; one tab stop, arrows, PageUp/Down, Home/End, Ctrl-Home/End.
   * @param {HTMLElement} el where @param {{label: string, columns: Column[], count: number, rowHeight?: number, headHeight?: number,
   *   sort?: [key, down: boolean][], load?(from, to, signal): Promise, onOpen?(i), onFocus?(i), onSort?(key, add), onError?(e)}} options
   *   Column = {key, name, width: px, grow?: share of what is left, title?, css?, sortable?: boolean, head?: Node,
   *   cell(td: HTMLElement, i: number), act?(i): on click and Space}; load: a block of 100 rows came into view; once done it is redrawn
   * @returns {{element, index, top, update(changes: {count?, sort?, columns?, top?, row?}), refresh(), focus(i), move(by)}}
   */
  mxd.table = (el, options) => {
    const id = `grid${grids++}`, state = { rowHeight: 28, headHeight: 28, count: 0, sort: [], ...options };
    const head = h("div", { class: "grid-head", role: "row", "aria-rowindex": "1" });
    const body = h("div", { class: "grid-body", role: "rowgroup" });
    const grid = h("div", { class: "grid", role: "grid", tabindex: "0", "aria-label": state.label }, head, body);
    let slots = [], top = 0, expected = -1, cur = { row: 0, col: 0 }, asking = new Map(), pending = 0, marked = null;
    const view = () => Math.max(grid.clientHeight - state.headHeight, state.rowHeight);
    const full = () => state.count * state.rowHeight, height = () => Math.min(full(), LIMIT), mapped = () => full() > LIMIT;
    const most = () => Math.max(state.count - view() / state.rowHeight, 0);

    function drawHead() {
      head.replaceChildren(...state.columns.map(({ key, name, css = "", sortable, title, head: more }, i) => {
        const at = state.sort.findIndex(([k]) => k === key), down = at >= 0 && state.sort[at][1];
        const arrow = at < 0 ? "" : ` ${down ? "▼" : "▲"}${state.sort.length > 1 ? at + 1 : ""}`;
        const click = (event) => sortable && state.onSort && state.onSort(key, event.shiftKey);
        const sort = at === 0 ? (down ? "descending" : "ascending") : sortable ? "none" : null;
        const th = h("div", { id: `${id}-h${i}`, class: `th ${css}${sortable ? " can" : ""}`, role: "columnheader", "aria-colindex": i + 1,
          "aria-sort": sort }, h("div", { class: "grid-name", on: { click } }, name, arrow), more);
        const lines = [title, sortable && "Click sorts; Shift-click adds a key."].filter(Boolean);
        return mxd.ui.tip(th, (target) => (target.closest(".brush") ? null : lines));
      }));
      const width = (c) => (c.grow ? `minmax(${c.width}px, ${c.grow}fr)` : `${c.width}px`);
      grid.style.setProperty("--cols", state.columns.map(width).join(" "));
      grid.style.setProperty("--row", `${state.rowHeight}px`);
      grid.setAttribute("aria-colcount", state.columns.length);
    }
    function makeSlots() {
      const n = Math.min(Math.ceil(view() / state.rowHeight) + 8, 60);
      if (slots.length === n && slots[0].cells.length === state.columns.length) return;
      slots = Array.from({ length: n }, (_, s) => {
        const cell = (c, i) => h("div", { id: `${id}-${s}-${i}`, class: `td ${c.css || ""}`, role: "gridcell", "aria-colindex": i + 1 });
        const cells = state.columns.map(cell);
        return { row: -1, cells, el: h("div", { class: "grid-row", role: "row", hidden: true }, cells) };
      });
      body.replaceChildren(...slots.map((s) => s.el));
    }
    function fill(slot, row) {
      slot.row = row;
      slot.el.setAttribute("aria-rowindex", row + 2);
      state.columns.forEach((c, i) => c.cell(slot.cells[i], row));
    }
    function draw(again) {
      pending = 0;
      const first = Math.max(0, Math.min(Math.floor(top) - 3, state.count - slots.length));
      for (let row = first; row < first + slots.length; row++) {
        const slot = slots[row % slots.length], there = row < state.count;
        if (slot.el.hidden === there) slot.el.hidden = !there;
        if (!there) slot.row = -1;
        if (!there) continue;
        if (slot.row !== row || again) fill(slot, row);
        const y = mapped() ? grid.scrollTop + (row - top) * state.rowHeight : row * state.rowHeight;
        slot.el.style.setProperty("transform", `translateY(${y}px)`);
        slot.el.classList.toggle("cur", row === cur.row);
      }
      mark();
      later();
    }
    const soon = (again) => { if (!pending) pending = requestAnimationFrame(() => draw(again)); };
    function active() {
      if (cur.row < 0) return head.children[cur.col];
      const slot = slots[cur.row % slots.length];
      return slot && slot.row === cur.row ? slot.cells[cur.col] : null;
    }
    function mark() {
      const cell = active();
      if (cell === marked) return;
      if (marked) marked.classList.remove("at");
      if (cell) cell.classList.add("at");
      if (cell) grid.setAttribute("aria-activedescendant", cell.id);
      else grid.removeAttribute("aria-activedescendant");
      marked = cell;
    }
    // Blocks in view are asked for once scrolling rests; those that left it before their answer are given up.
    const later = mxd.debounce(() => {
      if (!state.load || !state.count) return;
      const first = Math.floor(Math.max(top - 3, 0) / 100);
      const last = Math.floor(Math.min(top + view() / state.rowHeight + 3, state.count - 1) / 100);
      for (const [b, ask] of asking) {
        if (ask.done || (b >= first && b <= last)) continue;
        ask.stop.abort();
        asking.delete(b);
      }
      for (let b = first; b <= last; b++) if (!asking.has(b)) block(b, { stop: new AbortController(), done: false });
    }, 40);
    async function block(b, ask) {
      asking.set(b, ask);
      try {
        await state.load(b * 100, Math.min((b + 1) * 100, state.count), ask.stop.signal);
        ask.done = true;
        if (asking.get(b) === ask) draw(true);
      } catch (error) {
        if (asking.get(b) === ask) asking.delete(b);
        if (!mxd.aborted(error) && state.onError) state.onError(error);
      }
    }
    function place(row) {
      top = Math.max(0, Math.min(row, most()));
      grid.scrollTop = mapped() ? top / Math.max(most(), 1) * (height() - view()) : top * state.rowHeight;
      expected = grid.scrollTop;
    }
    function show(row) {
      const rows = Math.floor(view() / state.rowHeight);
      if (row < top) place(row);
      else if (row > top + rows - 1) place(row - rows + 1);
    }
    function focus(row, col = cur.col) {
      const moved = row !== cur.row;
      cur = { row: Math.max(-1, Math.min(row, state.count - 1)), col: Math.max(0, Math.min(col, state.columns.length - 1)) };
      if (cur.row >= 0) show(cur.row);
      draw();
      const cell = active();
      if (cell && grid.scrollWidth > grid.clientWidth) cell.scrollIntoView({ block: "nearest", inline: "nearest" });
      if (moved && cur.row >= 0 && state.onFocus) state.onFocus(cur.row);
    }
    function onKey(event) {
      const { key, ctrlKey, shiftKey } = event, page = Math.max(1, Math.floor(view() / state.rowHeight) - 1);
      const last = state.columns.length - 1, column = state.columns[cur.col];
      if (event.altKey || event.metaKey || event.target !== grid) return;
      const to = { ArrowDown: [cur.row + 1], ArrowUp: [cur.row - 1], PageDown: [cur.row + page], PageUp: [Math.max(cur.row - page, 0)],
        ArrowLeft: [cur.row, cur.col - 1], ArrowRight: [cur.row, cur.col + 1], Home: ctrlKey || cur.col === 0 ? [0, 0] : [cur.row, 0],
        End: ctrlKey || cur.col === last ? [state.count - 1, ctrlKey ? cur.col : last] : [cur.row, last] }[key];
      if (to) focus(...to);
      else if (key === "Enter" && cur.row < 0) column.sortable && state.onSort && state.onSort(column.key, shiftKey);
      else if (key === " " && cur.row >= 0 && column.act) column.act(cur.row);
      else if (key === "Enter" && state.onOpen) state.onOpen(cur.row);
      else return;
      event.preventDefault();
    }
    grid.addEventListener("keydown", onKey);
    grid.addEventListener("scroll", () => {
      if (Math.abs(grid.scrollTop - expected) < 1 && mapped()) return;
      top = mapped() ? grid.scrollTop / Math.max(height() - view(), 1) * most() : grid.scrollTop / state.rowHeight;
      soon();
    }, { passive: true });
    // Where scroll positions stand for many rows, the wheel still moves by rows.
    grid.addEventListener("wheel", (event) => {
      if (!mapped() || event.ctrlKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) return;
      event.preventDefault();
      place(top + event.deltaY / state.rowHeight);
      soon();
    }, { passive: false });
    body.addEventListener("click", (event) => {
      const slot = slots.find((s) => s.el.contains(event.target));
      if (!slot || slot.row < 0) return;
      const col = Math.max(0, slot.cells.findIndex((c) => c.contains(event.target)));
      focus(slot.row, col);
      if (state.columns[col].act) state.columns[col].act(slot.row);
    });
    new ResizeObserver(() => grid.clientHeight && (makeSlots(), draw(true))).observe(grid);

    function update(changes) {
      Object.assign(state, changes);
      for (const ask of asking.values()) ask.stop.abort();
      asking = new Map();
      drawHead();
      grid.setAttribute("aria-rowcount", state.count + 1);
      body.style.setProperty("height", `${height()}px`);
      if (cur.row >= 0) cur.row = Math.max(0, Math.min(changes.row ?? cur.row, state.count - 1));
      makeSlots();
      if ("count" in changes) place(changes.top ?? 0);
      draw(true);
    }
    el.append(grid);
    update({});
    const move = (by) => focus(Math.max(0, cur.row + by));
    return { element: grid, get index() { return cur.row; }, get top() { return top; }, update, refresh: () => draw(true), focus, move };
  };
})();
