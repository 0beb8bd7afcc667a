-- What several controls on one store tell each other by (follow.go).
CREATE TABLE revision (
    one       BIGINT NOT NULL PRIMARY KEY,
    current   BIGINT NOT NULL, -- of the newest write
    forgotten BIGINT NOT NULL  -- changes up to this revision are no longer kept
);
INSERT INTO revision (one, current, forgotten) VALUES (1, 0, 0);

CREATE TABLE change (
    revision BIGINT NOT NULL,
    kind     {{text}} NOT NULL,
    name     {{text}} NOT NULL,
    origin   {{text}} NOT NULL, -- the control that wrote it
    at       BIGINT NOT NULL,
    PRIMARY KEY (revision, kind, name)
);
CREATE INDEX change_at ON change (at);

CREATE TABLE replica (
    id      {{text}} NOT NULL PRIMARY KEY,
    address {{text}} NOT NULL, -- where the others reach it; '' nowhere
    beat    BIGINT NOT NULL    -- grows while it lives
);

-- An address belongs to one workload.
CREATE TABLE address (
    addr     {{text}} NOT NULL PRIMARY KEY,
    workload {{text}} NOT NULL
);
CREATE INDEX address_workload ON address (workload);

-- Pods that may be meshed and are not taken.
CREATE TABLE claim (
    pod  {{text}} NOT NULL PRIMARY KEY,
    host {{text}} NOT NULL
);

-- Which control has its stream ('': none), and the oldest bundle that anybody on it trusts, as
-- far as that was asked for.
ALTER TABLE host ADD COLUMN replica {{text}} NOT NULL DEFAULT '';
ALTER TABLE host ADD COLUMN bundle BIGINT NOT NULL DEFAULT 0;
