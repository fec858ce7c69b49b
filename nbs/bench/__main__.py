"The bench: `python -m nbs.bench` from the root of the repository."

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from harness import main

main()
