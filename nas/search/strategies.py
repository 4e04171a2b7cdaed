"""All strategies, by the names that experiments give them."""

from nas.search.ageing_evolution import ageing_evolution
from nas.search.bananas import bananas
from nas.search.grid import grid
from nas.search.local_search import local_search
from nas.search.nsga2 import nsga2
from nas.search.nsga3 import nsga3
from nas.search.predictor_search import predictor_search
from nas.search.random_search import random_search
from nas.search.reinforce import reinforce
from nas.search.sms_emoa import sms_emoa
from nas.search.successive_halving import successive_halving

# `make_strategy` calls them: by `strategy(sizes, population=...)`, with further keyword arguments.
STRATEGIES = {
    "random": random_search,
    "grid": grid,
    "local_search": local_search,
    "ageing_evolution": ageing_evolution,
    "nsga2": nsga2,
    "nsga3": nsga3,
    "sms_emoa": sms_emoa,
    "reinforce": reinforce,
    "bananas": bananas,
    "successive_halving": successive_halving,
    "predictor": predictor_search,
}
