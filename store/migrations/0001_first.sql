-- Keys of write transactions, to decide a COMMIT that got no answer (engine.go).
CREATE TABLE committed (
    id {{text}} NOT NULL PRIMARY KEY,
    at BIGINT NOT NULL
);

CREATE TABLE meta (
    name  {{text}} NOT NULL PRIMARY KEY,
    value {{bytes}} NOT NULL
);

-- Intent, as JSON.
CREATE TABLE object (
    kind       {{text}} NOT NULL,
    namespace  {{text}} NOT NULL,
    name       {{text}} NOT NULL,
    spec       {{text}} NOT NULL,
    source     {{text}} NOT NULL,
    generation BIGINT NOT NULL,  -- 1, then one more with each change of spec
    status     {{text}} NOT NULL, -- '' until there is one
    created    BIGINT NOT NULL,
    changed    BIGINT NOT NULL,
    PRIMARY KEY (kind, namespace, name)
);

CREATE TABLE host (
    id     {{text}} NOT NULL PRIMARY KEY,
    record {{text}} NOT NULL,
    joined BIGINT NOT NULL,
    seen   BIGINT NOT NULL
);

CREATE TABLE token (
    id       {{text}} NOT NULL PRIMARY KEY,
    hash     {{bytes}} NOT NULL,
    covers   {{text}} NOT NULL, -- JSON array
    creator  {{text}} NOT NULL,
    created  BIGINT NOT NULL,
    expires  BIGINT NOT NULL,
    consumer {{text}} NOT NULL, -- '' until it is consumed
    consumed BIGINT NOT NULL
);

CREATE TABLE workload (
    id     {{text}} NOT NULL PRIMARY KEY,
    host   {{text}} NOT NULL,
    record {{text}} NOT NULL
);
CREATE INDEX workload_host ON workload (host);

-- Stable numbers: each owner has one in a space, each number has one owner.
CREATE TABLE allocation (
    space  {{text}} NOT NULL,
    owner  {{text}} NOT NULL,
    number BIGINT NOT NULL,
    PRIMARY KEY (space, owner)
);
CREATE UNIQUE INDEX allocation_number ON allocation (space, number);
CREATE TABLE allocator (
    space {{text}} NOT NULL PRIMARY KEY,
    next  BIGINT NOT NULL
);

CREATE TABLE certificate (
    serial    {{text}} NOT NULL PRIMARY KEY,
    subject   {{text}} NOT NULL,
    workload  {{text}} NOT NULL,
    host      {{text}} NOT NULL,
    artifacts {{text}} NOT NULL,
    issuer    {{text}} NOT NULL,
    notbefore BIGINT NOT NULL,
    notafter  BIGINT NOT NULL,
    issued    BIGINT NOT NULL
);
CREATE INDEX certificate_notafter ON certificate (notafter);
CREATE INDEX certificate_workload ON certificate (workload);

CREATE TABLE audit (
    id      {{text}} NOT NULL PRIMARY KEY, -- sorts by time
    at      BIGINT NOT NULL,
    who     {{text}} NOT NULL,
    role    {{text}} NOT NULL,
    call    {{text}} NOT NULL,
    subject {{text}} NOT NULL,
    outcome {{text}} NOT NULL
);

-- The same finding again only counts.
CREATE TABLE finding (
    id       {{text}} NOT NULL PRIMARY KEY,
    workload {{text}} NOT NULL,
    kind     {{text}} NOT NULL,
    subject  {{text}} NOT NULL,
    detail   {{text}} NOT NULL,
    remedy   {{text}} NOT NULL,
    first    BIGINT NOT NULL,
    last     BIGINT NOT NULL,
    count    BIGINT NOT NULL
);
CREATE INDEX finding_last ON finding (last);
