// What all pages share: the theme's button, times in the viewer's zone, CSRF tokens of htmx, and pauses of refreshing.
(() => {
  "use strict";
  const root = document.documentElement;
  const systemDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : systemDark.matches);
  const csrf = () => document.querySelector('meta[name="csrf"]').content;
  const announceTheme = () => document.dispatchEvent(new CustomEvent("autotts:theme"));
  window.autotts = Object.assign(window.autotts || {}, { isDark, csrf });

  document.addEventListener("click", (event) => {
    if (event.target.closest("[data-theme-toggle]")) {
      root.dataset.theme = isDark() ? "light" : "dark";
      localStorage.setItem("autotts-theme", root.dataset.theme);
      announceTheme();
    }
    const copy = event.target.closest("[data-copy]");
    if (copy) {
      const text = document.getElementById(copy.dataset.copy).textContent;
      navigator.clipboard.writeText(text).then(() => {
        copy.textContent = "Copied";
        setTimeout(() => (copy.textContent = "Copy"), 1500);
      });
    }
  });
  systemDark.addEventListener("change", announceTheme);

  const zone = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });
  const showTimes = (element) => {
    for (const time of element.querySelectorAll("time[datetime]:not([data-shown])")) {
      const moment = new Date(time.dateTime);
      time.title = moment.toISOString();
      time.textContent = zone.format(moment);
      time.dataset.shown = "";
    }
  };

  // Fields that hold a local time are sent as seconds since 1970, so that the server needs no time zone.
  const sendTimes = (form) => {
    for (const field of form.querySelectorAll("input[type=datetime-local][data-sends]")) {
      const sent = form.elements[field.dataset.sends];
      sent.value = field.value ? String(new Date(field.value).getTime() / 1000) : "";
    }
  };
  const fillTimes = (element) => {
    for (const field of element.querySelectorAll("input[type=datetime-local][data-sends]")) {
      const sent = field.form.elements[field.dataset.sends].value;
      if (!sent || field.value) continue;
      const moment = new Date(Number(sent) * 1000);
      field.value = new Date(moment.getTime() - moment.getTimezoneOffset() * 60000).toISOString().slice(0, 16);
    }
  };
  document.addEventListener("submit", (event) => sendTimes(event.target));
  document.addEventListener("change", (event) => {
    const form = event.target.closest("form[data-auto-submit]");
    if (form) form.requestSubmit();
  });

  document.addEventListener("htmx:configRequest", (event) => (event.detail.headers["x-csrf-token"] = csrf()));
  // Nothing is refreshed while nobody looks, or while somebody reads a table or has the focus there.
  document.addEventListener("htmx:beforeRequest", (event) => {
    const element = event.detail.elt;
    if (!element.hasAttribute("data-polls")) return;
    const isInUse = element.contains(document.activeElement) || element.querySelector("details[open]");
    if (document.hidden || isInUse) event.preventDefault();
  });
  // Errors come with a text that says what to do.
  document.addEventListener("htmx:beforeSwap", (event) => {
    const status = event.detail.xhr.status;
    if (status >= 400 && !event.detail.elt.hasAttribute("data-polls")) event.detail.shouldSwap = true;
  });
  document.addEventListener("htmx:load", (event) => {
    showTimes(event.detail.elt);
    fillTimes(event.detail.elt);
  });
  document.addEventListener("DOMContentLoaded", () => {
    showTimes(document);
    fillTimes(document);
  });
})();
