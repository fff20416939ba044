"""Who runs where, and what if one of them dies? The only package that knows Ray.

    address     does a Ray answer there, and let this process in?
    connection  which Ray does this process speak to?
    preflight   what can the driver see before anything starts?
    placement   where may the ranks run, and is there room? (arithmetic, no Ray)
    waiting     who is waited for?
    seats       the reservations that Ray gives for it
    lost_nodes  was a rank's node lost, and where may it go?
    keeper      who gives them back when the caller was killed?
    names       what are group and ranks called?
    gpus        which GPU is this rank's?
    facts       what does a rank see of its machine?
    rank_actor  the actor around an ordinary worker object
    worker      that object: one rank's loads and tensors
    calls       calls in flight on several actors
    functions   who waits for the end of a function of the caller's?
    failures    which of several errors is the cause?
    group       one actor per rank, from start to teardown
    loads       how does a group load, once and again?
    turns       whose turn is it to change what ranks hold?
    gather      whole tensors out of the ranks' parts
    meters      where do metrics go? `ray_meter`: to Ray
    tracing     the ranks' traces on one time axis; `clocks`: how far their clocks are apart
    phases      where did the time go?
    model       what does the caller hold?
    driver      from a request to a model
    jobs        a command as a job of a cluster
    survey      what do the nodes of a running cluster answer?

Importing the package imports no Ray; `preflight`, `placement`, `names` and `phases` need none either.
"""
