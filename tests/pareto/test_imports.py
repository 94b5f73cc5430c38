import subprocess
import sys


def test_pareto_loads_no_lightning_and_no_pandas():
    code = (
        "import sys, lightning_merge.pareto; heavy = {'lightning', 'pytorch_lightning', 'pandas', "
        "'moocore', 'pyarrow'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
