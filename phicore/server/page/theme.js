/* Sets the theme before anything is drawn, so this is no module. */
(() => {
  const NAME = 'phicore-theme';
  const root = document.documentElement;
  const set = (theme) => {
    if (theme === 'light' || theme === 'dark') root.dataset.theme = theme;
    else delete root.dataset.theme;
  };
  const kept = () => {
    try {
      return localStorage.getItem(NAME) ?? 'system';
    } catch {
      return 'system';
    }
  };
  set(kept());
  addEventListener('storage', ({ key }) => key === NAME && set(kept()));
  globalThis.theme = {
    get: kept,
    set: (theme) => {
      localStorage.setItem(NAME, theme);
      set(theme);
    },
  };
})();
