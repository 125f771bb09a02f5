"""Peers: what else a user could call for an op's result, such as other libraries.

A paged peer reads a shared prefix from physical pages that all sequences' page tables point to, so
after the first sequence it comes from the L2 cache. The peers "-copied" show the cost of attention
without sharing, where each request has its own copy.
"""
