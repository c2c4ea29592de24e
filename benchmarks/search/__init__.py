"""Support of the search benchmark: recorded surfaces, priors, the samplers compared and their figures."""
