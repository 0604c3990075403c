"""The steps of the DAG: each calls the library's rooms with the results of earlier tasks.

A step gets and returns paths and digests (XComs, ``results``); its output is in folders named by digest.
Heavy imports stay inside the steps, as these modules are loaded at every parse of the DAG.
"""
