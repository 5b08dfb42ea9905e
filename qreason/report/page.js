// Filters the replies. Without it the page shows all of them.
"use strict";
const form = document.querySelector("form");
if (form) {
  const articles = [...document.querySelectorAll("article")];
  const texts = articles.map((article) => article.textContent.toLowerCase());
  const more = document.querySelector("#more");
  const count = document.querySelector("#count");
  const STEP = 10;
  let most = STEP;

  function matches(article, text) {
    const { search, change, from, to, split } = form.elements;
    const before = article.dataset.marks[from.selectedIndex];
    const now = article.dataset.marks[to.selectedIndex];
    return (
      search.value.toLowerCase().split(/\s+/).every((word) => text.includes(word)) &&
      (!split || !split.value || split.value === article.dataset.split) &&
      [...change.value].every((mark, place) => mark === "." || mark === [before, now][place])
    );
  }

  function show() {
    let found = 0;
    articles.forEach((article, place) => {
      const fits = matches(article, texts[place]);
      found += fits;
      article.hidden = !fits || found > most;
    });
    count.textContent = `${found} of ${articles.length}`;
    more.hidden = found <= most;
  }

  form.hidden = false;
  form.addEventListener("input", () => { most = STEP; show(); });
  form.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", () => { most += STEP; show(); });
  show();
}
