"""Why compression makes a layer faster or not: what is predicted beside what is measured.

    print(tn.explain(model, example))

Every layer of a plan is run dense and by each technique that has a kernel for it. Four lower bounds
are set beside the time that was measured: its multiply-adds at the machine's peak; its bytes from
the level of memory that holds them; what the indices of sparse weights make it load; a call of such
a kernel on next to nothing. From these numbers alone `rules` says in a sentence what decides.
"""

from tinynn.explain.measure import TECHNIQUES, explain
from tinynn.explain.parts import Bound, Explanation, Layer, Way

__all__ = ["TECHNIQUES", "Bound", "Explanation", "Layer", "Way", "explain"]
