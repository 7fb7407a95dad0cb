// Tells require.js where the vendored widget files lie: in vendor/ beside this file, at any page depth and for file://.
(function () {
  "use strict";
  var vendor = new URL("vendor/", document.currentScript.src).href;
  window.requirejs.config({ baseUrl: vendor, waitSeconds: 30, paths: { anywidget: vendor + "anywidget" } });
})();
