"""The tabular experiments of Czarnecki et al. 2019."""
