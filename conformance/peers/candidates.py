"""What `gaugeblock check --peers` judges: every peer whose library is installed, as a candidate like any other."""

from gaugeblock.conformance.engine.registry import implements
from gaugeblock.conformance.peers.peer import peers

for each in peers():
    implements(each.contract, name=each.name, **each.claims)(each.candidate())
