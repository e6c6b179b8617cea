"""`vnet diag`: what keeps names and connections from working on this machine, and what to do.

gather, probing (I/O)  -->  facts  -->  one pure check for each subject  -->  findings  -->  report
"""
