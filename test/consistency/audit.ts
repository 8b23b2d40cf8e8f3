/**
 * What really happened, told by the database itself and not by the code under test.
 *
 * Row triggers of the checker's own write down every state of every item. The log under test says which revision
 * belongs to it; a change for which it has none is a violation.
 *
 * An explicit invalidation changes no item, so nobody could tell from an answer whether a cache obeyed it. Here it does: a
 * trigger on the log gives every item that it concerns a new description, which the triggers under test do not see
 * (as if the content came from elsewhere, which is what explicit invalidations are for). So each copy shows which
 * invalidations it has missed. An item that another transaction has locked is left out: it changes next anyway.
 */
import type pg from 'pg'

export const AUDIT = `
CREATE TABLE audit (
  seq bigserial PRIMARY KEY, tenant text NOT NULL, id text NOT NULL, revision bigint, content text, row_revision bigint,
  silent boolean NOT NULL, tags text[] NOT NULL DEFAULT '{}'
);

CREATE TABLE audit_log (LIKE invalidations);

CREATE FUNCTION audit_item() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
  silent text := coalesce(current_setting('audit.revision', true), '');
BEGIN
  IF TG_OP = 'DELETE' THEN
    INSERT INTO audit (tenant, id, revision, content, silent) VALUES (OLD.tenant, OLD.id, NULL, NULL, false);
    RETURN NULL;
  END IF;
  IF TG_OP = 'UPDATE' AND (OLD.tenant, OLD.id) <> (NEW.tenant, NEW.id) THEN
    INSERT INTO audit (tenant, id, revision, content, silent) VALUES (OLD.tenant, OLD.id, NULL, NULL, false);
  END IF;
  INSERT INTO audit (tenant, id, revision, content, row_revision, silent, tags) VALUES (
    NEW.tenant, NEW.id,
    CASE WHEN silent <> '' THEN silent::bigint
      WHEN TG_OP = 'UPDATE' AND NEW.revision <> OLD.revision AND current_setting('itemcache.stamping', true) = 'on'
      THEN NEW.revision END,
    CASE WHEN NOT NEW.deleted THEN NEW.title || '|' || NEW.description END,
    NEW.revision, silent <> '', CASE WHEN NEW.deleted THEN '{}' ELSE NEW.tags || NEW.category END
  );
  RETURN NULL;
END
$$;
CREATE TRIGGER audit_item AFTER INSERT OR UPDATE OR DELETE ON items FOR EACH ROW EXECUTE FUNCTION audit_item();
ALTER TABLE items ENABLE ALWAYS TRIGGER audit_item;

CREATE FUNCTION audit_invalidation() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
  was text := coalesce(current_setting('itemcache.stamping', true), '');
BEGIN
  PERFORM set_config('audit.revision', NEW.revision::text, true), set_config('itemcache.stamping', 'on', true);
  UPDATE items SET description = 'r' || NEW.revision FROM (
    SELECT tenant AS t, id AS i FROM items
    WHERE tenant = NEW.tenant AND NOT deleted AND (
      NEW.kind = 'TENANT_INVALIDATED'
      OR NEW.kind = 'KEYS_INVALIDATED' AND id = ANY (NEW.ids)
      OR NEW.kind = 'TAGS_INVALIDATED' AND (tags && NEW.tags OR category = ANY (NEW.tags))
    )
    ORDER BY id FOR UPDATE SKIP LOCKED
  ) AS found WHERE tenant = t AND id = i;
  PERFORM set_config('audit.revision', '', true), set_config('itemcache.stamping', was, true);
  RETURN NULL;
END
$$;
CREATE TRIGGER audit_invalidation AFTER INSERT ON invalidations FOR EACH ROW
  WHEN (NEW.kind IN ('KEYS_INVALIDATED', 'TAGS_INVALIDATED', 'TENANT_INVALIDATED'))
  EXECUTE FUNCTION audit_invalidation();
ALTER TABLE invalidations ENABLE ALWAYS TRIGGER audit_invalidation;

-- The log may be trimmed; this is what it was.
CREATE FUNCTION audit_log() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO audit_log SELECT NEW.*;
  RETURN NULL;
END
$$;
CREATE TRIGGER audit_log AFTER INSERT ON invalidations FOR EACH ROW EXECUTE FUNCTION audit_log();
ALTER TABLE invalidations ENABLE ALWAYS TRIGGER audit_log;
`

/** One state of one item. `content` is null when it is absent. */
export interface AuditRow {
  readonly tenant: string
  readonly id: string
  /** Null for what the log under test has not (yet) given a revision. */
  readonly revision: number | null
  readonly content: string | null
  readonly row_revision: number | null
  readonly silent: boolean
  /** The category counts as one. */
  readonly tags: readonly string[]
  readonly xid: string
}

export interface LogRow {
  readonly tenant: string
  readonly revision: number
  readonly kind: string
  readonly mode: string
  readonly ids: readonly string[]
  readonly tags: readonly string[]
  readonly writer: string
  readonly xid: string
}

/** What one PostgreSQL holds of a history. */
export interface Testimony {
  readonly log: readonly LogRow[]
  readonly audit: readonly AuditRow[]
}

export async function testimonyOf(sql: pg.Client): Promise<Testimony> {
  const log = await sql.query(
    `SELECT tenant, revision, kind, mode, ids, tags, writer, xmin::text AS xid FROM audit_log ORDER BY tenant, revision`,
  )
  const audit = await sql.query(
    `SELECT tenant, id, revision, content, row_revision, silent, tags, xmin::text AS xid FROM audit ORDER BY seq`,
  )
  return { log: log.rows, audit: audit.rows }
}
