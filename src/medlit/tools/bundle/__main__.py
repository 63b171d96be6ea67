"""`python -m medlit.tools.bundle`."""

from medlit.tools.bundle import main

raise SystemExit(main())
