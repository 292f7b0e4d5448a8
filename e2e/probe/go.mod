// What the tests of the clusters themselves run in pods and as callers.
module antiphon.dev/e2e/probe

go 1.26.0

require golang.org/x/sys v0.40.0
