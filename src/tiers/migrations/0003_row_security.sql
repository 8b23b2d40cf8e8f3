-- Keeps tenants apart a second time: whatever a statement asks for, its session sees and changes the rows of the tenant
-- in the setting itemcache.tenant only. The service sets it with every statement that is about one tenant. Where it is
-- not set (psql, the tail, which reads the logs of many tenants) every tenant is there.
--
-- FORCE, since the service usually owns the tables. Superusers and roles with BYPASSRLS are not held by any of this.
DO $$
DECLARE
  name_of record;
BEGIN
  FOR name_of IN
    SELECT * FROM (VALUES
      ('tenants', 'name'), ('items', 'tenant'), ('item_tags', 'tenant'), ('invalidations', 'tenant'), ('requests', 'tenant')
    ) AS tables (relation, tenant)
  LOOP
    EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', name_of.relation);
    EXECUTE format('ALTER TABLE %I FORCE ROW LEVEL SECURITY', name_of.relation);
    EXECUTE format(
      $policy$CREATE POLICY one_tenant ON %I USING (
        %I = current_setting('itemcache.tenant', true) OR coalesce(current_setting('itemcache.tenant', true), '') = ''
      )$policy$, name_of.relation, name_of.tenant);
  END LOOP;
END
$$;
