"""`python -P -m gemexport.validators.runtimes.coreml PACKAGE PROMPT`."""

import sys

from gemexport.validators.runtimes.coreml import main

sys.exit(main())
