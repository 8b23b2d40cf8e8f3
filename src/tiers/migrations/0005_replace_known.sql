-- Replaces the content of items that are still as the caller knows them: one way to the database and back, one commit for all,
-- and nobody waits for the caller while the tenant's row is locked.
--
-- `writes` is an array of objects, of different items and request ids:
--   id, revision                what is known of the item
--   known_tags                  its tags
--   former_tags                 its tags and its category
--   writer, request_id, fingerprint   '' where there is none
--   title, description, …       the new content, by the columns' names
--
-- Its plans are kept for the session, and the tables may grow: so whatever is looked up is named to the index by an array.
--
-- What changes is logged here and not by the trigger on items, which would give all of it one revision: here each write has its own.
--
-- Returns what is there now, as of the tenant's revision. An item for which nothing was done is missing: it is at another
-- revision, or its request id was used before. All are missing when the server is older than the caller has seen, or the
-- session is another tenant's. Whoever misses one finds out by locking the row.
CREATE FUNCTION itemcache_replace_known(of_tenant text, known_timeline bigint, writes jsonb)
RETURNS TABLE (as_of bigint, item items) LANGUAGE plpgsql AS $$
DECLARE
  claiming text[];
  claimed text[];
  replacing text[];
  changing text[];
  lock_timeout text;
  before_first bigint;
  known_ids text[] := ARRAY(SELECT w ->> 'id' FROM jsonb_array_elements(writes) AS w);
BEGIN
  IF itemcache_timeline_start() < known_timeline
    OR current_setting('itemcache.tenant', true) IS DISTINCT FROM of_tenant THEN
    RETURN;
  END IF;

  -- Whoever writes claims its request id, then locks its items, each in order, then takes revisions: so that no two of
  -- these wait for each other for ever. What others hold is not waited for, or hardly: it must not hold up the rest.
  SELECT array_agg(w ->> 'request_id') INTO claiming
    FROM jsonb_array_elements(writes) AS w WHERE w ->> 'request_id' <> '';
  IF claiming IS NOT NULL THEN
    lock_timeout := current_setting('lock_timeout');
    BEGIN
      PERFORM set_config('lock_timeout', '20ms', true);
      WITH inserted AS (
        INSERT INTO requests (tenant, request_id, fingerprint)
          SELECT of_tenant, w.request_id, w.fingerprint
          FROM jsonb_to_recordset(writes) AS w (request_id text, fingerprint text)
          WHERE w.request_id <> ''
          ORDER BY w.request_id COLLATE "C"
          ON CONFLICT DO NOTHING
          RETURNING request_id
      )
      SELECT coalesce(array_agg(request_id), '{}') INTO claimed FROM inserted;
    EXCEPTION WHEN lock_not_available THEN
      -- A write with one of these ids is in progress.
      RETURN;
    END;
    PERFORM set_config('lock_timeout', lock_timeout, true);
  END IF;
  -- A write that changes nothing leaves no trace.
  SELECT coalesce(array_agg(locked.id), '{}'), array_agg(locked.id) FILTER (WHERE locked.changes) INTO replacing, changing
    FROM (
      SELECT i.id, (i.title, i.description, i.category, i.image_uri, i.price_currency, i.price_units, i.price_nanos,
            i.rating_rate, i.rating_count, i.tags, i.attributes)
          IS DISTINCT FROM (w.title, w.description, w.category, w.image_uri, w.price_currency, w.price_units, w.price_nanos,
            w.rating_rate, w.rating_count, w.tags, w.attributes) AS changes
      FROM jsonb_to_recordset(writes) AS w (
        id text, revision bigint, request_id text, title text, description text, category text, image_uri text,
        price_currency text, price_units bigint, price_nanos integer, rating_rate double precision, rating_count bigint,
        tags text[] COLLATE "C", attributes jsonb
      )
      JOIN items i ON i.tenant = of_tenant AND i.id = w.id COLLATE "C"
      WHERE i.id = ANY (known_ids) AND i.revision = w.revision AND NOT i.deleted AND (w.request_id = '' OR w.request_id = ANY (claimed))
      ORDER BY i.id
      FOR UPDATE OF i SKIP LOCKED
    ) AS locked;

  IF changing IS NOT NULL THEN
    before_first := itemcache_take_revisions(of_tenant, cardinality(changing)) - cardinality(changing);
    PERFORM set_config('itemcache.stamping', 'on', true);
    UPDATE items i
      SET (title, description, category, image_uri, price_currency, price_units, price_nanos, rating_rate, rating_count, tags,
          attributes) = ROW (w.title, w.description, w.category, w.image_uri, w.price_currency, w.price_units, w.price_nanos,
          w.rating_rate, w.rating_count, w.tags, w.attributes),
        source = 'LOCAL', revision = before_first + array_position(changing, i.id), update_time = now()
      FROM jsonb_to_recordset(writes) AS w (
        id text, title text, description text, category text COLLATE "C", image_uri text,
        price_currency text, price_units bigint, price_nanos integer, rating_rate double precision, rating_count bigint,
        tags text[] COLLATE "C", attributes jsonb
      )
      WHERE i.tenant = of_tenant AND i.id = w.id COLLATE "C" AND i.id = ANY (changing);
    PERFORM set_config('itemcache.stamping', '', true);
    INSERT INTO invalidations (tenant, revision, kind, mode, ids, tags, writer)
      SELECT of_tenant, before_first + array_position(changing, w.id), 'UPSERTED', 'EXPIRE', ARRAY[w.id],
        ARRAY(
          SELECT DISTINCT tag COLLATE "C" FROM unnest(w.former_tags || w.tags || w.category) AS tag WHERE tag <> '' ORDER BY 1
        ), w.writer
      FROM jsonb_to_recordset(writes) AS w (id text, writer text, category text, tags text[], former_tags text[])
      WHERE w.id = ANY (changing);
    DELETE FROM item_tags g
      USING jsonb_to_recordset(writes) AS w (id text, tags text[], known_tags text[]), unnest(w.known_tags) AS former
      WHERE w.id = ANY (changing) AND former <> ALL (w.tags)
        AND g.tenant = of_tenant AND g.tag = former COLLATE "C" AND g.id = w.id COLLATE "C";
    INSERT INTO item_tags (tenant, tag, id)
      SELECT of_tenant, tag, w.id
      FROM jsonb_to_recordset(writes) AS w (id text, tags text[], known_tags text[]), unnest(w.tags) AS tag
      WHERE w.id = ANY (changing) AND tag <> ALL (w.known_tags)
      ON CONFLICT DO NOTHING;
  END IF;

  IF claiming IS NOT NULL THEN
    DELETE FROM requests r USING jsonb_to_recordset(writes) AS w (id text, request_id text)
      WHERE r.tenant = of_tenant AND r.request_id = ANY (claimed) AND r.request_id = w.request_id COLLATE "C"
        AND w.id <> ALL (replacing);
    UPDATE requests r SET revision = i.revision, state = 'present', id = i.id, as_of = greatest(t.revision, s.timeline),
        item_revision = i.revision, former_tags = w.former_tags, outcome = to_jsonb(i)
      FROM jsonb_to_recordset(writes) AS w (id text, request_id text, former_tags text[])
      JOIN items i ON i.tenant = of_tenant AND i.id = w.id COLLATE "C"
      CROSS JOIN (SELECT itemcache_timeline_start() AS timeline) AS s
      LEFT JOIN tenants t ON t.name = of_tenant
      WHERE r.tenant = of_tenant AND r.request_id = ANY (claimed) AND r.request_id = w.request_id COLLATE "C"
        AND i.id = ANY (replacing);
  END IF;
  -- By a statement of its own, whose snapshot has the revisions that the triggers have just taken.
  RETURN QUERY
    SELECT greatest(t.revision, s.timeline), i
    FROM (SELECT itemcache_timeline_start() AS timeline) AS s
    LEFT JOIN tenants t ON t.name = of_tenant
    JOIN items i ON i.tenant = of_tenant AND i.id = ANY (replacing);
END
$$;

-- The item after the write, where `item` does not hold it encoded.
ALTER TABLE requests ADD COLUMN outcome jsonb;

-- The function finds its tables whatever the caller's search_path is.
DO $$
BEGIN
  EXECUTE format('ALTER FUNCTION itemcache_replace_known SET search_path = %I, pg_temp', current_schema());
END
$$;
