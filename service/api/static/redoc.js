"use strict";
Redoc.init("openapi.json", { disableSearch: false, hideLogo: true }, document.getElementById("redoc"));
