// Words searched as the server's index does it: BM25 over the words of explanation, top tokens and examples (SQLite FTS5).

const K1 = 1.2;
const B = 0.75;

// The rows with every one of the words, the beginning of a word being enough from three letters on; best first, by
// number where more than `data.most_ranked` match. Those with the text in their note alone come last.
export function matching(data, text) {
  const phrases = (text.match(/[\p{L}\p{N}_]+/gu) ?? []).map((term) => ({ words: wordsOf(term), begins: [...term].length > 2 }));
  const noted = data.rows.filter((row) => row.note.toLowerCase().includes(text.toLowerCase()));
  const lengths = data.rows.map((row) => columnsOf(row).reduce((n, words) => n + words.length, 0));
  const mean = lengths.reduce((a, b) => a + b, 0) / Math.max(1, lengths.length);
  const counts = phrases.map((phrase) => data.rows.map((row) => columnsOf(row).reduce((n, words) => n + hits(words, phrase), 0)));
  const weights = counts.map((own) => {
    const n = own.filter(Boolean).length;
    return Math.max(Math.log((own.length - n + 0.5) / (n + 0.5)), 1e-6);
  });
  const found = [];
  data.rows.forEach((row, i) => {
    if (!phrases.length || counts.some((own) => !own[i])) return;
    const longer = K1 * (1 - B + (B * lengths[i]) / mean);
    const score = counts.reduce((sum, own, at) => sum + (weights[at] * own[i] * (K1 + 1)) / (own[i] + longer), 0);
    found.push({ row, score });
  });
  const ranked = found.length <= data.most_ranked;
  if (ranked) found.sort((a, b) => b.score - a.score || a.row.latent - b.row.latent);
  const rows = found.map(({ row }) => row);
  return { rows: [...rows, ...noted.filter((row) => !rows.includes(row))], ranked };
}

// As FTS5's unicode61: letters and digits, without case and marks.
function wordsOf(text) {
  return text.normalize("NFD").replace(/\p{M}/gu, "").toLowerCase().match(/[\p{L}\p{N}\p{Co}]+/gu) ?? [];
}

function columnsOf(row) {
  row.words ??= [row.explanation ?? "", ...row.texts].map(wordsOf);
  return row.words;
}

function hits(words, phrase) {
  const last = phrase.words.length - 1;
  const same = (word, i) => (i === last && phrase.begins ? word?.startsWith(phrase.words[i]) : word === phrase.words[i]);
  let n = 0;
  for (let at = 0; at < words.length; at++) if (last >= 0 && phrase.words.every((_, i) => same(words[at + i], i))) n++;
  return n;
}
