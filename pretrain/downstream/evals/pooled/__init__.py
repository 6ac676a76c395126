"""Evaluations of one vector an image: k-NN, linear probe, logistic regression, few examples, retrieval, copies."""
