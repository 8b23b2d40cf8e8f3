-- What ItemCache keeps. Names and ids sort by bytes (COLLATE "C"): one order here, in pages and in every client.

-- A tenant's newest revision. The row is the lock that puts the commits of a tenant in order; without a row the
-- tenant is at the start of the timeline. Rows are never deleted: a tenant that started over would hand out its revisions twice.
CREATE TABLE tenants (
  name text COLLATE "C" PRIMARY KEY
    CHECK (octet_length(name) BETWEEN 1 AND 128 AND name !~ '[\x01-\x1f\x7f]'),
  revision bigint NOT NULL CHECK (revision > 0),
  -- When listeners were last told of a change.
  notified_at timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH (fillfactor = 50);

-- The items, and the marker rows (deleted) of those that are gone. The defaults let
--   INSERT INTO items (tenant, id, title) VALUES ('default', '77', 'Lamp')
-- work as it stands. `revision` and `update_time` are written by the triggers; what a statement says of them is
-- overwritten. No index holds these two, so that the trigger's UPDATE stays on the page (HOT); hence the fillfactor.
-- `source` is who has the last word on an item: an ORIGIN item that is changed by hand becomes LOCAL, unless the
-- statement itself sets another source or the transaction has set itemcache.loading to on.
CREATE TABLE items (
  tenant text COLLATE "C" NOT NULL
    CHECK (octet_length(tenant) BETWEEN 1 AND 128 AND tenant !~ '[\x01-\x1f\x7f]'),
  id text COLLATE "C" NOT NULL
    CHECK (octet_length(id) BETWEEN 1 AND 128 AND id !~ '[\x01-\x1f\x7f]'),
  title text NOT NULL DEFAULT '',
  description text NOT NULL DEFAULT '',
  category text COLLATE "C" NOT NULL DEFAULT '' CHECK (octet_length(category) <= 64),
  image_uri text NOT NULL DEFAULT '',
  -- The price is set when the currency is; it is units + nanos / 10^9.
  price_currency text CHECK (price_currency ~ '^[A-Z]{3}$'),
  price_units bigint,
  price_nanos integer NOT NULL DEFAULT 0,
  rating_rate double precision CHECK (rating_rate BETWEEN 0 AND 5),
  rating_count bigint CHECK (rating_count >= 0),
  -- The length of each tag is checked by item_tags, which holds every tag of a live item.
  tags text[] COLLATE "C" NOT NULL DEFAULT '{}'
    CHECK (cardinality(tags) <= 32 AND coalesce(array_ndims(tags), 1) = 1),
  attributes jsonb CHECK (jsonb_typeof(attributes) = 'object'),
  source text NOT NULL DEFAULT 'LOCAL' CHECK (source IN ('ORIGIN', 'LOCAL')),
  deleted boolean NOT NULL DEFAULT false,
  revision bigint NOT NULL DEFAULT 0,
  create_time timestamptz NOT NULL DEFAULT now() CHECK (isfinite(create_time)),
  update_time timestamptz NOT NULL DEFAULT now() CHECK (isfinite(update_time)),
  PRIMARY KEY (tenant, id),
  CONSTRAINT items_price_check CHECK (
    (price_currency IS NULL) = (price_units IS NULL)
    AND (price_currency IS NOT NULL OR price_nanos = 0)
    AND price_nanos BETWEEN -999999999 AND 999999999
    AND (price_units IS NULL OR price_nanos = 0 OR price_units = 0 OR sign(price_units) = sign(price_nanos))
  ),
  CONSTRAINT items_rating_check CHECK ((rating_rate IS NULL) = (rating_count IS NULL))
) WITH (fillfactor = 75);

CREATE INDEX items_by_category ON items (tenant, category, id) WHERE NOT deleted;

-- The tags of live items, in the order in which a list by tag reads them: a page costs its own length, however
-- common or rare the tag is. (A GIN index cannot hand rows out in the order of ids.) Kept by the triggers.
CREATE TABLE item_tags (
  tenant text COLLATE "C" NOT NULL,
  tag text COLLATE "C" NOT NULL CHECK (octet_length(tag) BETWEEN 1 AND 64),
  id text COLLATE "C" NOT NULL,
  PRIMARY KEY (tenant, tag, id)
);

-- The ordered log: revision by revision, without a hole, what stopped being current.
--
-- kind      what happened. DELETED: the items are absent from now on; UPSERTED: any other change of items.
-- mode      what a copy from before is still good for. REMOVE: nothing. EXPIRE: to be served, marked as stale, while
--           a newer one cannot be had. An explicit invalidation says which; DELETED is REMOVE; UPSERTED is EXPIRE,
--           since an older version of an item that exists is what a reader who accepts stale answers asked for.
-- ids       the items (at most 1,000); empty for TAGS_INVALIDATED and TENANT_INVALIDATED.
-- tags      for items: their tags and categories, before and after. For TAGS_INVALIDATED: the tags (at most 1,000).
-- writer    the setting itemcache.writer of the transaction; '' when it is not set, as in psql.
CREATE TABLE invalidations (
  tenant text COLLATE "C" NOT NULL,
  revision bigint NOT NULL,
  kind text NOT NULL CHECK (
    kind IN ('UPSERTED', 'DELETED', 'KEYS_INVALIDATED', 'TAGS_INVALIDATED', 'TENANT_INVALIDATED')
  ),
  mode text NOT NULL CHECK (mode IN ('EXPIRE', 'REMOVE')),
  ids text[] NOT NULL DEFAULT '{}',
  tags text[] NOT NULL DEFAULT '{}',
  committed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  writer text NOT NULL DEFAULT '',
  PRIMARY KEY (tenant, revision)
);

-- The outcome of every committed write that had a request id, so that its retry returns the same. Inserted first
-- (a concurrent retry waits on the key) and completed last, in the write's transaction.
CREATE TABLE requests (
  tenant text COLLATE "C" NOT NULL,
  request_id text COLLATE "C" NOT NULL,
  fingerprint text NOT NULL,
  revision bigint NOT NULL DEFAULT 0,
  -- The snapshot after the write; NULL for an explicit invalidation.
  state text CHECK (state IN ('present', 'deleted', 'unknown')),
  id text,
  as_of bigint,
  item_revision bigint,
  item bytea,
  tags text[],
  former_tags text[],
  created_at timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (tenant, request_id)
) WITH (fillfactor = 75);

CREATE INDEX requests_by_age ON requests (created_at);
