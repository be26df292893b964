// Draws the branches of a running episode from the progress that a stream reports after each round.
(() => {
  "use strict";
  const COLOURS = 8;
  const MOST_CELLS = 400; // of one branch; a longer one is summed up by its figures
  const number = new Intl.NumberFormat();

  const make = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };

  class Episode {
    constructor(branches, votes, facts) {
      this.branches = branches;
      this.votes = votes;
      this.facts = facts;
      this.rows = [];
      this.colours = new Map();
      for (const element of [branches, votes, facts]) element.replaceChildren();
    }

    get finished() {
      return this.rows.filter((row) => row.fate === "finished").length;
    }

    colour(answer) {
      if (answer === null || answer === undefined) return "";
      if (!this.colours.has(answer)) this.colours.set(answer, `a${this.colours.size % COLOURS}`);
      return this.colours.get(answer);
    }

    row(index) {
      while (this.rows.length <= index) {
        const item = make("li");
        const row = { item, answer: null, tokens: 0, intervals: 0, fate: "running" };
        row.cells = make("span", "cells");
        row.outcome = make("span", "outcome");
        item.append(make("span", "name", String(this.rows.length + 1)), row.cells, row.outcome);
        this.branches.append(item);
        this.rows.push(row);
      }
      return this.rows[index];
    }

    add(report) {
      const touched = new Set();
      for (const change of report.changes) {
        const row = this.row(change.branch);
        touched.add(row);
        if (change.action === "prune") {
          row.fate = "pruned";
          row.item.classList.add("pruned");
          row.cells.append(this.mark("✕", "pruned"));
          continue;
        }
        if (change.answer !== null) row.answer = change.answer;
        if (change.action === "probe") {
          if (row.fate === "running") this.paint(row, change.answer, "?");
          continue;
        }
        row.tokens += change.tokens;
        row.intervals += change.intervals;
        for (let i = 0; i < change.intervals && row.cells.childElementCount < MOST_CELLS; i += 1) {
          row.cells.append(make("span", `cell ${this.colour(row.answer)}`));
        }
        if (change.finished) {
          row.fate = "finished";
          row.answer = change.answer;
          this.paint(row, row.answer);
          row.cells.append(this.mark("✓", "finished"));
        }
      }
      for (const row of touched) this.describe(row);
      this.showVotes(report.votes);
      this.showFacts([
        ["Round", number.format(report.round)],
        ["Branches", `${number.format(report.branches)}, ${number.format(report.running)} running`],
        ["Tokens so far", number.format(report.tokens)],
      ]);
    }

    // Colours the last cell of a row by the answer that is known now.
    paint(row, answer, sign) {
      const last = [...row.cells.querySelectorAll(".cell")].pop();
      if (!last) return;
      last.className = `cell ${this.colour(answer)}`;
      if (sign) last.textContent = sign;
    }

    mark(sign, title) {
      const mark = make("span", "mark", sign);
      mark.title = title;
      return mark;
    }

    describe(row) {
      const answer = row.answer === null ? "no answer" : row.answer;
      row.outcome.textContent = `${answer} · ${number.format(row.tokens)}`;
      row.outcome.title = `${answer}, ${number.format(row.tokens)} tokens, ${row.fate}`;
      row.cells.setAttribute("role", "img");
      row.cells.setAttribute("aria-label", `${row.fate} after ${row.intervals} intervals`);
    }

    showVotes(votes) {
      this.votes.replaceChildren();
      if (!votes.length) {
        this.votes.append(make("li", "muted", "No branch has finished with an answer yet."));
        return;
      }
      const most = Math.max(...votes.map((vote) => vote.count));
      for (const vote of votes) {
        const item = make("li");
        const track = make("span", "track");
        const fill = make("span", "fill");
        fill.style.width = `${(100 * vote.count) / most}%`;
        track.append(fill);
        item.append(make("span", `cell ${this.colour(vote.answer)}`), make("span", "text", vote.answer), make("strong", "", number.format(vote.count)), track);
        this.votes.append(item);
      }
    }

    showFacts(facts) {
      this.facts.replaceChildren();
      for (const [name, value] of facts) this.facts.append(make("dt", "", name), make("dd", "", value));
    }
  }

  window.autotts = Object.assign(window.autotts || {}, { Episode, make });
})();
