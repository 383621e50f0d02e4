// In an exported file only: contexts get back their text, which the file holds once for all of them.
"use strict";
(() => {
  const { mxd } = window;
  const FIRST = 0x20;
  const SURROGATES = [0xd800, 0x800];

  /** The data of an exported file as the server would have answered it; units are put together when they are asked for. */
  mxd.unpacked = (data) => {
    const { vocabulary, docs, sequences } = data;
    const opened = new Map();

    /** Ids and texts of the tokens that are kept of a sequence. */
    function sequence(seq) {
      if (opened.has(seq)) return opened.get(seq);
      const [first, letters, odd] = sequences[seq];
      const found = { first, ids: [], texts: [] };
      for (const letter of letters) {
        const code = letter.codePointAt(0);
        const place = (code < SURROGATES[0] ? code : code - SURROGATES[1]) - FIRST;
        found.ids.push(vocabulary.ids[place]);
        found.texts.push(vocabulary.texts[place]);
      }
      for (const [at, text] of odd || []) found.texts[at] = text;
      opened.set(seq, found);
      return found;
    }
    function context({ n, ...kept }) {
      const { first, ids, texts } = sequence(kept.seq);
      const [name, source] = docs[kept.doc];
      const from = kept.start - first;
      const parts = texts.slice(from, from + n);
      const cuts = [0];
      for (const part of parts) cuts.push(cuts[cuts.length - 1] + part.length);
      return { ...kept, text: parts.join(""), cuts, doc: { name, source }, ids: ids.slice(from, from + n) };
    }
    const unit = (packed) => ({ ...packed, bands: packed.bands.map((band) => ({ ...band, contexts: band.contexts.map(context) })) });

    for (const { units, rows } of Object.values(data.students)) {
      for (const row of Object.values(rows)) if (row.best) row.best = context(row.best);
      for (const [number, packed] of Object.entries(units)) {
        let whole = null;
        Object.defineProperty(units, number, { enumerable: true, get: () => (whole = whole || unit(packed)) });
      }
    }
    return data;
  };
})();
