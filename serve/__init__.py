"""The live policy as an OpenAI-compatible endpoint: a Ray Serve application in front of the policy's replicas.

`gateway` has the application, `endpoint` starts and stops it, `catalogue` knows the versions, `policy_app` calls the
replicas. Each request passes `middleware`, then a handler in `routes`, which reads its body with `requests`. `page` has
the files of the web page. Nothing here trains or holds weights. Imports go to actors and run, never to loop.
"""
