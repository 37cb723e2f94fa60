"use strict";
// Filters, sorts and shows the cards a page at a time. Without it all of them stand there, in the order of the rows.
(() => {
  const PAGE = 120;
  const controls = document.getElementById("controls");
  const box = document.getElementById("cards");
  const count = document.getElementById("count");
  const more = document.getElementById("more");
  const cards = [...box.children];
  const names = new Map(
    cards.map((card) => [card, [...card.querySelectorAll(".label, b")].map((name) => name.textContent.toLowerCase())]),
  );
  const order = new Intl.Collator("en", { numeric: true });
  const rankOf = (ranking) => "rank" + ranking[0].toUpperCase() + ranking.slice(1);
  let found = [];
  let shown = PAGE;

  const value = (name) => (controls.elements[name] ? controls.elements[name].value : "");

  const matches = (card) => {
    const { dataset } = card;
    const figure = Number(dataset[value("figure")]);
    const text = value("text").trim().toLowerCase();
    return (
      (!value("ranking") || rankOf(value("ranking")) in dataset) &&
      (!value("label") || dataset.label === value("label")) &&
      (!value("top1") || dataset.top1 === value("top1")) &&
      (!value("from") || figure >= Number(value("from"))) &&
      (!value("to") || figure <= Number(value("to"))) &&
      (!text || dataset.key.toLowerCase().includes(text) || names.get(card).some((name) => name.includes(text)))
    );
  };

  const show = () => {
    box.replaceChildren(...found.slice(0, shown));
    more.hidden = found.length <= shown;
    count.textContent = `${found.length.toLocaleString("en")} of ${cards.length.toLocaleString("en")} samples`;
  };

  const apply = () => {
    const ranking = value("ranking");
    found = cards.filter(matches);
    if (ranking) found.sort((a, b) => b.dataset[rankOf(ranking)] - a.dataset[rankOf(ranking)]);
    else found.sort((a, b) => order.compare(a.dataset.key, b.dataset.key));
    for (const about of document.querySelectorAll(".about")) about.hidden = about.dataset.ranking !== ranking;
    shown = PAGE;
    show();
  };

  controls.addEventListener("input", apply);
  controls.addEventListener("reset", () => setTimeout(apply));
  controls.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", () => {
    const next = found[shown];
    shown += PAGE;
    show();
    const link = next.querySelector("a");
    if (link) link.focus(); // the keyboard goes on where the new ones begin
  });
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[data-top1]");
    if (!link) return;
    controls.reset();
    controls.elements.ranking.value = "";
    if (controls.elements.label) controls.elements.label.value = link.dataset.label;
    controls.elements.top1.value = link.dataset.top1;
    setTimeout(apply);
  });
  apply();
})();
