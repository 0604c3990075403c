"""What each task of the DAG does: the library's rooms, called with what the tasks before left.

A step gets paths and digests (XComs) and returns the same (``results``); what it makes lies in folders
named by digest. Heavy imports stay inside the steps: these modules are loaded at every parse of the DAG.
"""
